"""Layers of one input as one operator: found by pattern, with the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export.gate import Limit
from export.targets import onnxruntime, ort_joined
from export.targets.base import LowerOptions
from export.verify import program_signatures, record, seeded_inputs
from graphs.program import Program, Signature
from graphs.spec import Dim, TensorSpec
from runtimes.base import Artifact, load_runtime
from tests.export.targets.test_onnxruntime_quantized import quantized
from tests.export.targets.test_ort_attention import decoder
from tests.tiny import toy_program

WIDTH = 64


class Branches(nn.Module):
    """Two layers of one input, of which one is read twice; a third, of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        return self.last(torch.tanh(one) * self.two(x) + one)


def branches() -> Program:
    rows = Dim("sequence", 1, 64)
    x, y = (TensorSpec(name, (1, rows, WIDTH)) for name in "xy")
    return toy_program("decoder", Branches, Signature((x,), (y,)))


def outputs(program: Program, directory: Path) -> tuple[list[np.ndarray], dict[str, int]]:
    """Of seeded calls, and the operators that made them."""
    directory.mkdir()
    target = onnxruntime.TARGET
    made = target.lower(target.legalize(program), directory, LowerOptions("float32", {"decoder": Limit(1.0)}))
    signatures = program_signatures(program)
    runtime = load_runtime("onnxruntime", Artifact(directory, signatures, made.files, made.details))
    calls = record(runtime, seeded_inputs(signatures))["decoder"]
    return [call.outputs[0] for call in calls], made.details["methods"]["decoder"]["operators"]


@pytest.mark.parametrize("scheme", ["w4g32a8b", "w4g32z", "w8g16"])
@pytest.mark.parametrize(("kind", "before", "after"), [("branches", 3, 2), ("decoder", 15, 9)])
def test_joined(
    kind: str, before: int, after: int, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = quantized(branches() if kind == "branches" else decoder("grouped"), {"linear": scheme})
    joined, operators = outputs(program, tmp_path / "joined")
    monkeypatch.setattr(ort_joined, "MOST_BYTES", 0)
    apart, separate = outputs(program, tmp_path / "apart")
    assert (separate["MatMulNBits"], operators["MatMulNBits"]) == (before, after)
    assert operators.get("Split", 0) == (1 if kind == "branches" else 2)
    assert all(np.array_equal(a, b) for a, b in zip(joined, apart, strict=True))
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).glob("*.data")) for name in ("joined", "apart")]
    assert sizes[0] == pytest.approx(sizes[1], abs=8192)


def test_attention_takes_them_packed(tmp_path: Path) -> None:
    outputs(quantized(decoder("grouped"), {"linear": "w4g32a8b"}), tmp_path / "joined")
    graph = onnx.load(tmp_path / "joined" / "decoder.onnx", load_external_data=False).graph
    found = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert [(bool(node.input[0]), *node.input[1:3]) for node in found] == [(True, "", "")] * 2
