"""Short names and merged constants leave an ML program computing what it did."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.proto import Model_pb2
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from export.targets import coreml_convert, coreml_names
from graphs.program import Signature
from graphs.spec import TensorSpec
from graphs.trace import trace_module
from runtimes.mil.model import MilModel

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")


class Twice(nn.Module):
    """The same softmax over two shapes: operands that are equal, and an input that has a short name already."""

    def forward(self, v0: Tensor) -> Tensor:
        a = torch.softmax(v0.reshape(1, 4, 4), -1).transpose(1, 2)
        b = torch.softmax((v0 + 1.5).reshape(1, 4, 4), -1).transpose(1, 2)
        return torch.cat((a, b), 1)


def blocks(spec: Any) -> list[Any]:
    return [b for f in spec.mlProgram.functions.values() for b in f.block_specializations.values()]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A package as coremltools writes it, and the same with short names."""
    directory = tmp_path_factory.mktemp("names")
    inputs = (TensorSpec("v0", (1, 16), torch.float32),)
    signature = Signature(inputs, (TensorSpec("out", (1, 8, 4), torch.float32),))
    exported = trace_module(Twice(), inputs, FakeTensorMode(allow_non_fake_inputs=True))
    plain, short = directory / "plain.mlpackage", directory / "short.mlpackage"
    coreml_convert.convert("m", exported, signature, "fp32", plain)
    shutil.copytree(plain, short)
    spec = Model_pb2.Model.FromString((plain / MODEL).read_bytes())
    coreml_names.shorten(spec)
    (short / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    return plain, short


def test_the_program_computes_the_same(packages: tuple[Path, Path]) -> None:
    x = np.random.default_rng(0).normal(size=(1, 16)).astype(np.float32)
    plain, short = (MilModel(path)({"v0": x})["out"] for path in packages)
    assert np.array_equal(plain, short)
    assert plain.shape == (1, 8, 4)


def test_equal_constants_are_one_and_names_are_short(packages: tuple[Path, Path]) -> None:
    plain, short = (Model_pb2.Model.FromString((path / MODEL).read_bytes()) for path in packages)
    (before,), (after,) = blocks(plain), blocks(short)
    values = [
        op.attributes["val"].SerializeToString(deterministic=True) for op in after.operations if op.type == "const"
    ]
    assert len(values) == len(set(values)) < sum(op.type == "const" for op in before.operations)
    kinds = [Counter(op.type for op in b.operations if op.type != "const") for b in (before, after)]
    assert kinds[0] == kinds[1]
    assert list(after.outputs) == list(before.outputs) == ["out"]
    made = [output.name for op in after.operations for output in op.outputs]
    assert len(made) == len(set(made))
    assert "v0" not in made
    assert max(len(name) for name in made if name != "out") <= 3
    assert short.ByteSize() < 0.8 * plain.ByteSize()
