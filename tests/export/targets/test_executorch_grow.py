"""Graphs made of three lowered layers of each stack are those that all layers give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from torch import Tensor, nn

from export.targets import executorch_grow
from export.targets.executorch import FILE
from graphs.program import Program, Signature
from graphs.spec import Dim, TensorSpec
from tests.export.targets.test_executorch import errors, lower
from tests.tiny import toy_program

WIDTH, CONTEXT, LAYERS = 160, 16, 7
STAGES = (1, 6, 2, 5)
LENGTH = Dim("length", 1, CONTEXT)


class Layer(nn.Module):
    """A norm, which a portable kernel runs, and a linear layer large enough to be hollow, which XNNPACK runs."""

    def __init__(self, remembers: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        if remembers:
            self.register_buffer("cache", torch.zeros(CONTEXT, WIDTH))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        y = self.linear(self.norm(x)) * 2 + 1  # constants that passes make, cast for each layer
        if isinstance(cache := getattr(self, "cache", None), Tensor):
            cache.copy_(cache.index_copy(0, positions, y))
            y = y + cache.mean(0)
        return x + y


class Remembering(nn.Module):
    """A stack of layers with state."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(True) for _ in range(LAYERS)])

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, positions)
        return x


class Staged(nn.Module):
    """A stack of one stage and one of several, at whose end is what other stages do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.ModuleList([Layer(False) for _ in range(depth)]) for depth in STAGES])

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for number, stage in enumerate(self.stages, 1):
            for layer in stage:
                x = layer(x, positions)
            x = torch.relu(x) * number
        return x


class Dense(nn.Module):
    """A stack that XNNPACK runs as a whole, so that no unit of it repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)])

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * positions.to(x.dtype).unsqueeze(-1)


def program(module: type[nn.Module], method: str = "net") -> Program:
    inputs = (TensorSpec("x", (LENGTH, WIDTH)), TensorSpec("positions", (LENGTH,), torch.int64, "positions"))
    caches = [f"layers.{n}.cache" for n in range(LAYERS)] if module is Remembering else []
    state = tuple(TensorSpec(name, (CONTEXT, WIDTH)) for name in caches)
    return toy_program(method, module, Signature(inputs, (TensorSpec("y", (LENGTH, WIDTH)),), state))


def contents(path: Path) -> tuple[set[str], list[int], list[int]]:
    """Names of the weights in a file (digests of their bytes), sizes of its delegates, and of its chain."""
    file = deserialize_pte_binary(path.read_bytes())
    plan = file.program.execution_plan[0]
    sizes = [len(delegate.data) for delegate in file.program.backend_delegate_data]
    called = [sizes[delegate.processed.index] for delegate in plan.delegates]
    return set(file.named_data.pte_data), called, [len(plan.chains[0].instructions)]


def watch(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each method grew, one after the other."""
    found: list[bool] = []
    run = executorch_grow.Grower.run

    def watched(grower: executorch_grow.Grower, stacks: list[tuple[str, ...]]) -> object:
        grown = run(grower, stacks)
        found.append(grown is not None)
        return grown

    monkeypatch.setattr(executorch_grow.Grower, "run", watched)
    return found


def test_a_grown_file_is_the_lowered_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    net = program(Remembering)
    assert executorch_grow.runs(net, "net") == [tuple(f"layers.{n}" for n in range(LAYERS))]
    assert executorch_grow.middle({"net": [("a", "b", "c", "d", "e")]}) == {"net": ("c", "d")}
    grown, whole, found = tmp_path / "grown", tmp_path / "whole", watch(monkeypatch)
    for directory in (grown, whole):
        directory.mkdir()
    made = lower(net, grown)
    assert found == [True]
    assert errors(net, made, grown)["net"] < 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(executorch_grow, "LEAST", 1 << 20)
        lower(net, whole)
    assert contents(grown / FILE) == contents(whole / FILE)
    assert made.details["methods"]["net"]["kernels"] == {"linear f32": LAYERS}


def test_stacks_within_stages_are_grown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    net = program(Staged)
    stacks = [tuple(f"stages.{stage}.{n}" for n in range(STAGES[stage])) for stage in (1, 3)]
    assert executorch_grow.runs(net, "net") == stacks
    found = watch(monkeypatch)
    made = lower(net, tmp_path)
    assert found == [True]
    assert errors(net, made, tmp_path)["net"] < 1e-5
    assert made.details["methods"]["net"]["kernels"] == {"linear f32": sum(STAGES)}


def test_what_is_not_periodic_is_lowered_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    net = program(Dense)
    assert len(executorch_grow.runs(net, "net")) == 1
    found = watch(monkeypatch)
    made = lower(net, tmp_path)
    assert found == [False, True]
    assert errors(net, made, tmp_path)["net"] < 1e-5
    assert made.details["methods"]["net"]["kernels"] == {"linear f32": LAYERS}


def test_only_what_is_not_periodic_is_lowered_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second, third = program(Remembering), program(Dense, "dense"), program(Remembering, "last")
    parts = (first, second, third)
    methods, weights = ({k: v for part in parts for k, v in getattr(part, of).items()} for of in ("methods", "weights"))
    net = replace(first, methods=methods, weights=weights)
    found = watch(monkeypatch)
    made = lower(net, tmp_path)
    assert found == [True, False, True, True]  # the last is the second method's, which has no stack then
    assert max(errors(net, made, tmp_path).values()) < 1e-5
    plans = deserialize_pte_binary((tmp_path / FILE).read_bytes()).program.execution_plan
    assert set(methods) <= {plan.name for plan in plans}


def test_weights_that_are_parts_of_larger_tensors(tmp_path: Path) -> None:
    net = program(Remembering)
    parts = {name: torch.cat([torch.full_like(t, 9.0), t])[t.shape[0] :] for name, t in net.weights.items()}
    made = lower(replace(net, weights=parts), tmp_path)
    assert errors(net, made, tmp_path)["net"] < 1e-5
