"""A cache is read where it lies: what attention reads has the buffers' memory, in the shape that attention wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from executorch.exir._serialize._program import deserialize_pte_binary

from tests.export.targets.test_executorch import lower
from tests.export.targets.test_executorch_attention import CONTEXT, GROUPS, WIDTH, plain, quantized

STATE = {"cache.k", "cache.v"}


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
    assert (1, GROUPS, CONTEXT, WIDTH) not in {tuple(found.values[index].val.sizes) for index in cached}
