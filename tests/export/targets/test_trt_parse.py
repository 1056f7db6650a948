"""Weights of an ONNX file reach the parser where they lie, and their pages do not stay."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.targets.trt_parse import PERIOD, external, mapped

WEIGHTS = {name: np.arange(1 << 18, dtype=np.float32) + seed for seed, name in enumerate("ab")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A graph of two large weights and a small one that stays inside the file."""
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in WEIGHTS.items()]
    tensors.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "small"))
    node = onnx.helper.make_node("Sum", ["a", "b", "small"], ["y"])
    made = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1 << 18])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [made], tensors))
    found = tmp_path / "g.onnx"
    onnx.save(model, found, save_as_external_data=True, location="g.onnx.data", size_threshold=1024)
    return found


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    sizes, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            sizes += int(line.split()[1]) * 1024
    return sizes


def test_external(path: Path) -> None:
    with mapped(path.with_name("g.onnx.data")) as weights:
        found = dict(external(path.read_bytes(), weights))
        assert set(found) == set(WEIGHTS)
        for name, (address, size) in found.items():
            assert ctypes.string_at(address, size) == WEIGHTS[name].tobytes()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells what is resident on Linux alone")
def test_pages_go(path: Path) -> None:
    data = path.with_name("g.onnx.data")
    with mapped(data) as weights:
        total = int(weights.sum(dtype=np.int64))
        deadline = time.monotonic() + 40 * PERIOD
        while resident(data) and time.monotonic() < deadline:
            time.sleep(PERIOD / 4)
        assert resident(data) == 0
        assert int(weights.sum(dtype=np.int64)) == total  # what went comes back


def test_no_weights(tmp_path: Path) -> None:
    with mapped(tmp_path / "none.data") as weights:
        assert weights.size == 0
