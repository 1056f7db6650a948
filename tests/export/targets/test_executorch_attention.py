"""Attention over a cache reads the tokens so far, by the operator of ExecuTorch's language models, where it may."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from torch import Tensor, nn
from torch.nn import functional as F

from export.targets import executorch_attention
from export.targets.base import Lowered
from export.verify import program_signatures
from graphs.components.text.cache import KVCache, causal_mask
from graphs.program import Program, Signature
from graphs.rewrite import Opened
from graphs.spec import Dim, TensorSpec
from quant.insert import Choice, insert
from quant.layers import layers
from quant.scheme import Scheme
from runtimes.base import Artifact, load_runtime
from runtimes.eager import EagerRuntime
from tests.export.targets.test_executorch import lower
from tests.export.targets.test_executorch_quant import rounded
from tests.tiny import toy_program

HEADS, GROUPS, WIDTH, CONTEXT = 4, 2, 16, 24
LENGTH = Dim("length", 1, CONTEXT)
OPERATOR = "llama::custom_sdpa"
STATE = {"cache.k", "cache.v"}


class Net(nn.Module):
    """Grouped-query attention over a cache and a linear layer behind it."""

    def __init__(self, window: int = 0, prefix: bool = False, scale: float | None = None, peeks: bool = False) -> None:
        super().__init__()
        self.cache = KVCache(GROUPS, CONTEXT, WIDTH)
        self.qkv = nn.Linear(64, (HEADS + 2 * GROUPS) * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, 64)
        self.window, self.prefix, self.scale, self.peeks = window, prefix, scale, peeks

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, WIDTH)).transpose(1, 2)
            for part in self.qkv(x).split([HEADS * WIDTH, GROUPS * WIDTH, GROUPS * WIDTH], dim=-1)
        )
        k, v = self.cache(k, v, positions)
        first = v[:, :, 0].flatten(1).unsqueeze(1).repeat(1, 1, HEADS // GROUPS) if self.peeks else 0
        k, v = (t.unsqueeze(2).expand(-1, -1, HEADS // GROUPS, -1, -1).flatten(1, 2) for t in (k, v))
        mask = causal_mask(positions, CONTEXT, x.dtype, self.window, self.prefix)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.out(found.transpose(1, 2).flatten(2) + first)


def plain(make: partial[Net] | type[Net] = Net) -> Program:
    inputs = (TensorSpec("x", (1, LENGTH, 64)), TensorSpec("positions", (LENGTH,), torch.int64, "positions"))
    cache = (1, GROUPS, CONTEXT, WIDTH)
    state = (TensorSpec("cache.k", cache), TensorSpec("cache.v", cache))
    return toy_program("net", make, Signature(inputs, (TensorSpec("y", (1, LENGTH, 64)),), state))


def quantized(program: Program) -> Program:
    """The layer behind attention in 4 bits, its activations as they are."""
    scheme = Scheme.parse("w4g32a8t")
    made = {
        ("net", layer.entry): Choice(
            scheme, layer.entry, lambda entry=layer.entry: rounded(program.weights[entry], scheme), None, None
        )
        for layer in layers(Opened.open(program, "net"))
        if layer.entry == "out.weight"
    }
    return insert(program, made)


def matched(program: Program) -> int:
    return sum(executorch_attention.match(node) is not None for node in Opened.open(program, "net").graph.nodes)


def operators(lowered: Lowered) -> dict[str, int]:
    found: dict[str, int] = lowered.details["methods"]["net"]["portable_operators"]
    return found


@pytest.mark.parametrize("scale", [None, 0.5])
def test_chunks_of_a_prompt_and_steps(scale: float | None, tmp_path: Path) -> None:
    program = quantized(plain(partial(Net, scale=scale)))
    made = lower(program, tmp_path)
    assert operators(made)[OPERATOR] == 1
    artifact = Artifact(tmp_path, program_signatures(program), made.files, made.details)
    runtime, source = load_runtime("executorch", artifact), EagerRuntime(program)
    x = np.random.default_rng(0).standard_normal((1, CONTEXT, 64), np.float32)
    for again in range(2):
        runtime.reset()
        source.reset()
        for start, end in ((0, 5), (5, 6), (6, 14), (14, 15), (15, CONTEXT)):
            call = [x[:, start:end] * (1 + again), np.arange(start, end)]
            (mine,), (theirs,) = runtime.call("net", call), source.call("net", call)
            assert np.linalg.norm(mine - theirs) < 1e-2 * np.linalg.norm(theirs)


def test_float_graphs_need_no_library_of_kernels(tmp_path: Path) -> None:
    program = plain()
    assert matched(program) == 1
    assert OPERATOR not in operators(lower(program, tmp_path))


@pytest.mark.parametrize("options", [{"window": 4}, {"prefix": True}])
def test_other_masks_stay(options: dict[str, int], tmp_path: Path) -> None:
    program = plain(partial(Net, **options))
    assert matched(program) == 0
    assert OPERATOR not in operators(lower(quantized(program), tmp_path))


def plan(path: Path) -> Any:
    """What a .pte of one method does."""
    read = deserialize_pte_binary(path.read_bytes())
    return getattr(read, "program", read).execution_plan[0]


def memory(plan: Any, index: int) -> tuple[int, int] | None:
    """Where a value is planned to lie."""
    found = getattr(plan.values[index].val, "allocation_info", None)
    return found and (found.memory_id, found.memory_offset_low)


def buffers(plan: Any) -> set[tuple[int, int] | None]:
    """Where the caches lie."""
    named = {
        index: getattr(getattr(value.val, "extra_tensor_info", None), "fully_qualified_name", "")
        for index, value in enumerate(plan.values)
    }
    assert set(named.values()) >= STATE
    return {memory(plan, index) for index, name in named.items() if name in STATE}


def test_a_cache_that_is_read_elsewhere_keeps_its_layout(tmp_path: Path) -> None:
    program = quantized(plain(partial(Net, peeks=True)))
    assert matched(program) == 1
    made = lower(program, tmp_path)
    assert OPERATOR not in operators(made)
    runtime = load_runtime("executorch", Artifact(tmp_path, program_signatures(program), made.files, made.details))
    call = [np.random.default_rng(0).standard_normal((1, 5, 64), np.float32), np.arange(5)]
    (mine,), (theirs,) = runtime.call("net", call), EagerRuntime(program).call("net", call)
    assert np.linalg.norm(mine - theirs) < 1e-2 * np.linalg.norm(theirs)


def test_caches_are_read_where_they_lie(tmp_path: Path) -> None:
    lower(quantized(plain()), tmp_path)
    found = plan(tmp_path / "model.pte")
    calls = [instruction.instr_args for instruction in found.chains[0].instructions]
    names = [found.operators[call.op_index].name if hasattr(call, "op_index") else "delegate" for call in calls]
    written = max(number for number, name in enumerate(names) if name == "aten::index_put_")
    reads = [index for call in calls[written + 1 :] for index in getattr(call, "args", [])]
    cached = [index for index in reads if memory(found, index) in buffers(found)]
    assert {memory(found, index) for index in cached} == buffers(found)
    assert len(buffers(found)) == 2
    assert {tuple(found.values[index].val.sizes) for index in cached} == {(1, CONTEXT, GROUPS, WIDTH)}
