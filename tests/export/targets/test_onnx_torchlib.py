"""The list of translations is torch's own, and one graph's additions are not another's."""

from __future__ import annotations

import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from export.targets.onnx_graph import OPSET
from export.targets.onnx_torchlib import LIST, listed_once


def test_lists_are_copies_of_what_torch_makes() -> None:
    relu = torch.ops.aten.relu.default
    theirs = LIST(opset_version=OPSET)
    with listed_once():
        first, second = (ONNXRegistry.from_torchlib(opset_version=OPSET) for _ in range(2))
    first.register_op(relu, lambda x: x)
    assert second.opset_version == theirs.opset_version == OPSET
    assert {target: len(found) for target, found in second.functions.items()} == {
        target: len(found) for target, found in theirs.functions.items()
    }
    assert len(first.get_decomps(relu)) == len(second.get_decomps(relu)) + 1
    assert ONNXRegistry.from_torchlib == LIST
