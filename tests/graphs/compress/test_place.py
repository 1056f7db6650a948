"""Places are found in any encoder by path and operator: another tower, without a class token, and another projector."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from graphs.compress.base import apply, parse
from graphs.errors import UserError
from graphs.program import Program, Signature, TracedMethod
from graphs.spec import TensorSpec
from graphs.trace import trace_module
from tests.numbers import relative_l2

WIDTH, SIDE, OUT = 8, 4, 12


class Tower(nn.Module):
    """Patches of one pixel, one layer of attention with a scale of its own, no class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.k, self.v = (nn.Linear(n, WIDTH) for n in (3, WIDTH, WIDTH, WIDTH))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels.flatten(2).transpose(1, 2))
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + F.scaled_dot_product_attention(q, k, v, scale=2.0).transpose(1, 2).flatten(2)


class Resampler(nn.Module):
    """As many tokens as there are queries, each a mixture of all patches."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 1, SIDE, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.queries, x[:, None], x[:, None])[:, 0]


class Encoder(nn.Module):
    def __init__(self, projector: nn.Module, name: str = "projector") -> None:
        super().__init__()
        self.tower, self.between = Tower(), name
        self.add_module(name, projector)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.get_submodule(self.between)(self.tower(pixels))


def encoder(projector: nn.Module, name: str = "projector", method: str = "vision_encoder") -> Program:
    module = Encoder(projector, name).eval().requires_grad_(False)
    spec = TensorSpec("pixel_values", (1, 3, SIDE, SIDE))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with fake:
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                setattr(owner, name, nn.Parameter(fake.from_tensor(parameter.detach()), requires_grad=False))
    exported = trace_module(module, (spec,), fake)
    shape = tuple(exported.graph.output_node().all_input_nodes[0].meta["val"].shape)
    traced = TracedMethod(Signature((spec,), (TensorSpec("image_embeds", shape),)), exported, {n: n for n in state})
    return Program({method: traced}, state, {})


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, OUT), nn.GELU(), nn.Linear(OUT, OUT))


def test_without_a_class_token_attention_received_on_average_decides() -> None:
    torch.manual_seed(0)
    program, x = encoder(mlp()), torch.randn(1, 3, SIDE, SIDE)
    w = program.weights
    embedded = x.flatten(2).mT[0] @ w["tower.embed.weight"].T + w["tower.embed.bias"]
    q, k = ((embedded @ w[f"tower.{n}.weight"].T + w[f"tower.{n}.bias"]).chunk(2, -1) for n in "qk")
    received = sum((2.0 * q[head] @ k[head].T).softmax(-1).mean(0) for head in (0, 1))
    best = sorted(torch.as_tensor(received).argsort(descending=True)[:5].tolist())
    (full,) = program.module("vision_encoder")(x)
    pruned = apply(parse("prune{keep=5,method=cls_attention}"), program)
    (kept,) = pruned.module("vision_encoder")(x)
    assert kept.shape == (5, OUT)
    assert relative_l2(kept, full[best]) < 1e-6


@pytest.mark.parametrize("text", ["pool{factor=2}", "prune{keep=3}", "prune{keep=3,method=visionzip}"])
def test_another_architecture_takes_the_passes(text: str) -> None:
    program = apply(parse(text), encoder(mlp()))
    count = 4 if text.startswith("pool") else 3
    assert program.methods["vision_encoder"].signature.outputs[0].shape == (1, count, OUT)
    assert program.module("vision_encoder")(torch.randn(1, 3, SIDE, SIDE)).shape == (1, count, OUT)


def test_tokens_of_a_resampler_are_no_grid() -> None:
    program = encoder(Resampler())
    assert apply(parse("prune{keep=3}"), program).methods["vision_encoder"].signature.outputs[0].shape[1] == 3
    with pytest.raises(UserError, match="pool finds no square grid of tokens"):
        apply(parse("pool{factor=2}"), program)
    with pytest.raises(UserError, match="cls_attention cannot lay the tower's 4 x 4 patches over 4 tokens"):
        apply(parse("prune{keep=3,method=cls_attention}"), program)


def test_no_place() -> None:
    with pytest.raises(UserError, match=r"no operators of a module 'projector', only of \['bridge', 'tower'\]"):
        apply(parse("prune{keep=3,method=visionzip}"), encoder(mlp(), "bridge"))
    with pytest.raises(UserError, match="no method 'vision_encoder', only image_encoder"):
        apply(parse("prune{keep=3}"), encoder(mlp(), method="image_encoder"))
