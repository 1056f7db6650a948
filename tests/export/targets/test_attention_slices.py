"""Attention in slices of queries gives the same numbers, in the graph and in what runtimes make of it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from export.gate import Limit
from export.targets.attention_slices import ATTENTION, slice_attention
from export.targets.base import LowerOptions, load_target
from export.verify import compare, program_signatures, record, seeded_inputs
from graphs.program import Program, Signature
from graphs.spec import Dim, TensorSpec
from runtimes.base import Artifact, load_runtime
from runtimes.eager import EagerRuntime
from tests.export.targets.test_ort_multi_head import HEADS, WIDTH, Block, Mask, by_head, keys, near, none
from tests.tiny import toy_program

TOKENS, STEP = 23, 6
#: bytes of scores of so many queries
MOST = 4 * HEADS * TOKENS * STEP


def program_of(mask: Mask, tokens: int | Dim = TOKENS) -> Program:
    specs = (TensorSpec(name, (1, tokens, WIDTH)) for name in "xy")
    taken, given = ((spec,) for spec in specs)
    return toy_program("net", lambda: Block(mask, factor=0.7), Signature(taken, given))


@pytest.mark.parametrize("mask", [none, near, by_head, keys], ids=lambda mask: mask.__name__)
def test_the_same_numbers(mask: Mask, tmp_path: Path) -> None:
    program = program_of(mask)
    sliced = slice_attention(program, MOST)
    sliced.check()
    found = sliced.methods["net"].exported.graph.find_nodes(op="call_function", target=ATTENTION)
    assert [node.meta["val"].shape[2] for node in found] == [STEP, STEP, STEP, TOKENS - 3 * STEP]
    signatures = program_signatures(program)
    inputs = seeded_inputs(signatures)
    expected = record(EagerRuntime(program), inputs)
    assert compare(record(EagerRuntime(sliced), inputs), expected)["net"]["relative_l2"] < 1e-6
    for name in ("onnxruntime", "executorch"):
        target, directory = load_target(name), tmp_path / name
        directory.mkdir()
        made = target.lower(target.legalize(sliced), directory, LowerOptions("float32", {"net": Limit(1e-4)}))
        runtime = load_runtime(name, Artifact(directory, signatures, made.files, made.details))
        assert compare(record(runtime, inputs), expected)["net"]["relative_l2"] < 1e-6
    operators = [node.op_type for node in onnx.load(tmp_path / "onnxruntime" / "net.onnx").graph.node]
    assert (operators.count("MultiHeadAttention"), operators.count("Softmax")) == (4, 0)


def test_what_stays_whole() -> None:
    program = program_of(none)
    assert slice_attention(program, MOST * TOKENS) is program  # all scores together take less
    unknown = program_of(none, Dim("tokens", 2, 40))
    assert slice_attention(unknown, 1) is unknown
