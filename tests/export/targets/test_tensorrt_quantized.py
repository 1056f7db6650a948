"""Quantized programs as TensorRT-RTX engines: ONNX evaluated, products in the promised dtypes, weights packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export.gate import Limit
from export.targets.base import Lowered, LowerOptions
from export.targets.tensorrt import TARGET
from graphs.errors import GateError
from graphs.program import Program, Signature
from graphs.rewrite import Opened
from graphs.spec import Dim, TensorSpec
from quant.insert import Choice, insert
from quant.layers import layers
from quant.precision import CastFloats
from quant.scheme import Scheme, WeightScheme
from tests.tiny import toy_program

WIDTH, ROWS = 768, 4096
#: what an engine holds beside its weights: its kernels and plans
KERNELS = 1_000_000
LENGTH = Dim("sequence", 1, 64)


class Feed(nn.Module):
    """Two matrices of 768 x 1536."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(nn.functional.silu(self.up(self.norm(x))))
        return out


class Patches(nn.Module):
    """A strided convolution, a depthwise and a pointwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 8, 8), nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Hardswish(), nn.Conv2d(64, 128, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Rows(nn.Module):
    """An embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(ROWS, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.rows(ids)
        return out


HIDDEN = (1, LENGTH, WIDTH)
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], TensorSpec, TensorSpec]] = {
    "linear": (Feed, TensorSpec("x", HIDDEN), TensorSpec("y", HIDDEN)),
    "conv": (Patches, TensorSpec("x", (1, 3, 64, 64)), TensorSpec("y", (1, 128, 8, 8))),
    "embedding": (Rows, TensorSpec("ids", (1, LENGTH), torch.int64, "ids", ROWS), TensorSpec("y", HIDDEN)),
}


def program_of(kind: str) -> Program:
    """One of the networks with random weights, its method named after it."""
    make, given, made = NETWORKS[kind]
    return toy_program(kind, make, Signature((given,), (made,)))


def rounded(weight: Tensor, scheme: WeightScheme) -> dict[str, Tensor]:
    """Round to nearest, symmetric."""
    most = 448 if scheme.kind == "float8" else 2 ** (scheme.bits - 1) - 1
    blocks = weight.unflatten(-1, (-1, scheme.group)) if scheme.group else weight
    axes = -1 if scheme.group else tuple(range(1, weight.dim()))
    scale = blocks.abs().amax(axes, keepdim=True) / most
    q = blocks / scale if scheme.kind == "float8" else (blocks / scale).round()
    if scheme.group:
        q, scale = q.flatten(-2), scale.squeeze(-1)
    return {"q": q.to(torch.float8_e4m3fn if scheme.kind == "float8" else torch.int8), "scale": scale}


def quantized(kind: str, text: str, floats: str, zero_point: int | None = None) -> Program:
    """A network in a scheme; activations are taken to lie within 4 of zero."""
    program, scheme = program_of(kind), Scheme.parse(text)
    most = 448 if scheme.activations == "af8" else 127
    zero = None if zero_point is None else torch.tensor(zero_point, dtype=torch.int8)
    range_ = (torch.tensor(4 / most), zero) if scheme.needs_ranges else None

    def choice(entry: str) -> Choice:
        return Choice(scheme, entry, lambda: rounded(program.value(entry), scheme.weights), range_)

    found = layers(Opened.open(program, kind))
    program = insert(program, {(kind, layer.entry): choice(layer.entry) for layer in found})
    return program if floats == "float32" else CastFloats(getattr(torch, floats)).run(program)


def lowered(program: Program, directory: Path, floats: str, limit: float) -> Lowered:
    options = LowerOptions(floats, dict.fromkeys(program, Limit(limit)), extra={"builder": "tensorrt-rtx"})
    return TARGET.lower(TARGET.legalize(program), directory, options)


def facts(made: Lowered, kind: str) -> tuple[float, dict[str, int], Any]:
    """The error that was checked, how many products read which dtypes, and all that was recorded."""
    assert "relative L2 " in made.checked[kind]
    error = float(made.checked[kind].split("relative L2 ")[1].split(";")[0])
    recorded = made.details["methods"][kind]
    return error, recorded["quantized_layers"], recorded


@pytest.mark.parametrize(
    ("text", "floats", "bits", "reads"),
    [
        ("w8a8", "float16", 8, "int8 x int8"),
        ("f8af8", "float16", 8, "fp8 x fp8"),
        ("w8", "float16", 8, "half x int8"),
        ("w4g32", "float16", 4.5, "half x int4"),
        ("w4g64", "float16", 4.25, "half x int4"),
        ("w4g128", "float16", 4.125, "half x int4"),
        ("w4g128", "bfloat16", 4.125, "bf16 x int4"),
        ("w8a8", "float32", 8, "int8 x int8"),
    ],
)
def test_linear_weights_stay_packed(text: str, floats: str, bits: float, reads: str, tmp_path: Path) -> None:
    limit = 5e-2 if floats == "bfloat16" else 1e-2
    error, products, recorded = facts(lowered(quantized("linear", text, floats), tmp_path, floats, limit), "linear")
    assert error <= limit
    assert products == {f"matrix_multiply {reads}": 2}
    weights = 4 * WIDTH * WIDTH * bits / 8
    assert weights < recorded["bytes"] < weights + KERNELS < 4 * WIDTH * WIDTH * 2
    assert [profile["name"] for profile in recorded["profiles"]] == ["all"]


def test_convolutions(tmp_path: Path) -> None:
    error, products, _ = facts(lowered(quantized("conv", "w8a8", "float16"), tmp_path, "float16", 1e-2), "conv")
    assert error <= 1e-2
    assert products == {"convolution int8 x int8": 3}


def test_embedding_stays_packed(tmp_path: Path) -> None:
    program = quantized("embedding", "w8", "float16")
    error, gathers, recorded = facts(lowered(program, tmp_path, "float16", 1e-2), "embedding")
    assert error <= 1e-3
    assert gathers["gather int8"] == 1
    assert ROWS * WIDTH < recorded["bytes"] < ROWS * WIDTH + KERNELS


def test_capabilities_are_of_this_library(tmp_path: Path) -> None:
    """Zero points are what the library refuses, and so `symmetric` is said of it."""
    assert TARGET.capabilities.symmetric
    with pytest.raises(GateError, match=r"QuantizeLinear\): .*Non-zero zero point is not supported"):
        lowered(quantized("linear", "w8a8", "float16", zero_point=3), tmp_path, "float16", 1e-2)
