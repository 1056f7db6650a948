"""What is left out changes nothing: translations are torch's own, and the ONNX is the same to the byte."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from export.targets.onnx_graph import OPSET
from export.targets.onnx_overhead import LIST, spared


def test_lists_are_copies_of_what_torch_makes() -> None:
    relu = torch.ops.aten.relu.default
    theirs = LIST(opset_version=OPSET)
    with spared():
        first, second = (ONNXRegistry.from_torchlib(opset_version=OPSET) for _ in range(2))
    first.register_op(relu, lambda x: x)
    assert second.opset_version == theirs.opset_version == OPSET
    assert {target: len(found) for target, found in second.functions.items()} == {
        target: len(found) for target, found in theirs.functions.items()
    }
    assert len(first.get_decomps(relu)) == len(second.get_decomps(relu)) + 1
    assert ONNXRegistry.from_torchlib == LIST


class Mixed(nn.Module):
    """Integers beside floats, which are cast, and comparisons."""

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return torch.where(n > 2, x * n, n + 0.5) / n


def written(exported: torch.export.ExportedProgram) -> bytes:
    made = torch.onnx.export(exported, dynamo=True, optimize=False, verbose=False)
    assert made is not None
    return made.model_proto.SerializeToString(deterministic=True)


def test_casts_are_those_of_torch() -> None:
    example = (torch.ones(3, 4), torch.arange(4))
    one, other = (torch.export.export(Mixed(), example) for _ in range(2))
    plain = written(one)
    with spared():
        assert written(other) == plain
    assert plain.count(b"Cast") >= 2
