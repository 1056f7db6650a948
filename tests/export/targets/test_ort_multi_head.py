"""Attention to what a call computes as one operator: found by its pattern, with the graph's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from export.gate import Limit
from export.targets.base import LowerOptions
from export.targets.onnxruntime import TARGET
from export.verify import compare, program_signatures, record, seeded_inputs
from graphs.program import Program, Signature
from graphs.spec import Dim, TensorSpec
from quant.precision import CastFloats
from runtimes.base import Artifact, load_runtime
from runtimes.eager import EagerRuntime
from tests.tiny import toy_program

WIDTH, HEADS = 48, 3
TOKENS = Dim("tokens", 2, 40)

Mask = Callable[[Tensor], Tensor | None]


def none(x_BSD: Tensor) -> None:
    """All is seen."""


def near(x_BSD: Tensor) -> Tensor:
    """[S, S]: a token sees those around it."""
    place_S = torch.arange(x_BSD.shape[1])
    return torch.where((place_S.unsqueeze(1) - place_S).abs() < 3, 0.0, -1e4)


def by_head(x_BSD: Tensor) -> Tensor:
    """[1, A, S, S]: as far as a head sees."""
    place_S, reach_A11 = torch.arange(x_BSD.shape[1]), torch.tensor([1, 4, 9]).view(-1, 1, 1)
    return torch.where((place_S.unsqueeze(1) - place_S).abs() < reach_A11, 0.0, -1e4).unsqueeze(0)


def keys(x_BSD: Tensor) -> Tensor:
    """[B, 1, 1, S]: tokens that nobody sees."""
    return torch.where(x_BSD[:, :, 0] > -0.5, 0.0, -1e4)[:, None, None]


class Block(nn.Module):
    """A token's queries, keys and values, and attention among tokens."""

    def __init__(self, mask: Mask, turned: bool = False, factor: float | None = None) -> None:
        super().__init__()
        self.mask, self.turned, self.factor = mask, turned, factor
        self.proj, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.proj(x_BSD).chunk(3, -1))
        if self.turned:
            q, k = q * q.cos(), k + k.flip(-1)
        made = nn.functional.scaled_dot_product_attention(q, k, v, self.mask(x_BSD), scale=self.factor)
        return self.out(made.transpose(1, 2).flatten(2))


class Pooled(nn.Module):
    """One query of the model's own, and what is made of heads as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, HEADS, 1, WIDTH // HEADS))
        self.proj = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x_BSD: Tensor) -> Tensor:
        k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.proj(x_BSD).chunk(2, -1))
        made: Tensor = nn.functional.scaled_dot_product_attention(self.query * 2, k, v)
        return made.softmax(1).transpose(1, 2).flatten(2)


class Crossed(nn.Module):
    """A decoder's attention to keys that lie ready as heads, each call anew: turning them would cost more."""

    def forward(self, x_BSD: Tensor, heads_BACK: Tensor) -> Tensor:
        q_BASK = x_BSD.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        made: Tensor = nn.functional.scaled_dot_product_attention(q_BASK, heads_BACK, heads_BACK + 1)
        return made.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    batch: int | Dim = 1
    tokens: int | Dim = TOKENS
    found: int = 1
    rows: int | Dim = TOKENS


CASES = {
    "unmasked": Case(lambda: Block(none)),
    "fixed": Case(lambda: Block(none), tokens=24, rows=24),
    "scaled": Case(lambda: Block(none, factor=0.7)),
    "batch": Case(lambda: Block(none), batch=Dim("pictures", 1, 3)),
    "turned heads": Case(lambda: Block(none, turned=True)),
    "mask": Case(lambda: Block(near)),
    "mask of heads": Case(lambda: Block(by_head)),
    "mask of keys": Case(lambda: Block(keys), batch=Dim("pictures", 1, 3)),
    "mask of keys, turned": Case(lambda: Block(keys, turned=True)),
    "pooled": Case(Pooled, tokens=24, rows=1),
    "crossed": Case(Crossed, found=0),
}


def program_of(case: Case) -> Program:
    inputs = [TensorSpec("x", (case.batch, case.tokens, WIDTH))]
    if case.make is Crossed:
        inputs.append(TensorSpec("heads", (1, HEADS, Dim("source", 2, 30), WIDTH // HEADS)))
    outputs = (TensorSpec("y", (case.batch, case.rows, WIDTH)),)
    return toy_program("net", case.make, Signature(tuple(inputs), outputs))


@pytest.mark.parametrize("name", CASES)
def test_found_and_exact(name: str, tmp_path: Path) -> None:
    program = program_of(CASES[name])
    made = TARGET.lower(TARGET.legalize(program), tmp_path, LowerOptions("float32", {"net": Limit(1e-4)}))
    operators = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert operators.count("MultiHeadAttention") == CASES[name].found
    assert operators.count("Softmax") == (1 - CASES[name].found) + (name == "pooled")
    inputs = seeded_inputs(program_signatures(program))
    runtime = load_runtime("onnxruntime", Artifact(tmp_path, program_signatures(program), made.files, made.details))
    assert compare(record(runtime, inputs), record(EagerRuntime(program), inputs))["net"]["relative_l2"] < 1e-6


def test_other_floats_stay(tmp_path: Path) -> None:
    program = CastFloats(torch.float16).run(program_of(CASES["mask"]))
    TARGET.lower(TARGET.legalize(program), tmp_path, LowerOptions("float16", {"net": Limit(1e-2)}))
    operators = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert (operators.count("MultiHeadAttention"), operators.count("Softmax")) == (0, 1)
