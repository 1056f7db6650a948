"""The projectors against the definitions of the papers, written out anew and loaded through the public key names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphs.components.connectors.ldp import LDP, LDPv2, squeeze_width
from tests.numbers import relative_l2


def randomized(module: torch.nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return dict(module.eval().state_dict())


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]


def inverted_residual(x: Tensor, w: dict[str, Tensor], prefix: str, stride: int) -> Tensor:
    def at(name: str) -> Tensor:
        return w[f"{prefix}.block.{name}"]

    y = F.conv2d(x, at("0.0.weight"), stride=stride, padding=1, groups=x.shape[1])
    y = F.hardswish(channel_norm(y, at("0.1.weight"), at("0.1.bias")))
    gate = F.adaptive_avg_pool2d(y, 1)
    gate = F.conv2d(F.relu(F.conv2d(gate, at("1.fc1.weight"), at("1.fc1.bias"))), at("1.fc2.weight"), at("1.fc2.bias"))
    y = y * F.hardsigmoid(gate)
    y = channel_norm(F.conv2d(y, at("2.0.weight")), at("2.1.weight"), at("2.1.bias"))
    return x + y if stride == 1 else y


@pytest.mark.parametrize("grid", [6, 7])
def test_ldp_halves_the_grid_as_the_paper_defines(grid: int) -> None:
    module = LDP(20, 32, grid)
    w = randomized(module)
    tokens = torch.randn(2, grid * grid, 20)
    x = F.linear(F.gelu(F.linear(tokens, w["mlp.1.weight"], w["mlp.1.bias"])), w["mlp.3.weight"], w["mlp.3.bias"])
    x = x.permute(0, 2, 1).reshape(2, 32, grid, grid)
    x = inverted_residual(inverted_residual(x, w, "mb_block.1", 1), w, "mb_block.2", 2)
    expected = x.flatten(2).permute(0, 2, 1)
    with torch.no_grad():
        actual = module(tokens)
    assert actual.shape == (2, ((grid + 1) // 2) ** 2, 32)
    assert relative_l2(actual, expected) <= 1e-5


@pytest.mark.parametrize("grid", [24, 16])
def test_ldpv2_pools_to_twelve_by_twelve(grid: int) -> None:
    module = LDPv2(10, 16, grid)
    w = randomized(module)
    tokens = torch.randn(1, grid * grid, 10)
    x = F.linear(F.gelu(F.linear(tokens, w["mlp.0.weight"], w["mlp.0.bias"])), w["mlp.2.weight"], w["mlp.2.bias"])
    x = F.adaptive_avg_pool2d(x.permute(0, 2, 1).reshape(1, 16, grid, grid), (12, 12))
    x = x + F.conv2d(x, w["peg.weight"], w["peg.bias"], padding=1, groups=16)
    with torch.no_grad():
        actual = module(tokens)
    assert actual.shape == (1, 144, 16)
    assert relative_l2(actual, x.flatten(2).transpose(1, 2)) <= 1e-5


def test_squeeze_width_is_mobilenets() -> None:
    assert [squeeze_width(width) for width in (64, 192, 2048, 2560, 4096)] == [16, 48, 512, 640, 1024]
    assert squeeze_width(16) == 8
