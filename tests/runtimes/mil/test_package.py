"""Damaged packages end as one line that names the file and the cause, before anything is computed."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from graphs.errors import UserError
from runtimes.mil.model import MilModel
from runtimes.mil.package import Package
from runtimes.mil.proto import message_module
from tests.runtimes.mil.packages import mb, save, types

WEIGHT = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
BLOB = Path("Data/com.apple.CoreML/weights/weight.bin")
SPEC = Path("Data/com.apple.CoreML/model.mlmodel")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.mlpackage"
    save(path, {"x": mb.TensorSpec((1, 32), types.fp32)}, lambda x: mb.linear(x=x, weight=WEIGHT, bias=WEIGHT[0]))
    return path


@pytest.fixture
def package(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "a.mlpackage")
    return tmp_path / "a.mlpackage"


def patch(path: Path, offset: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)


def edit(package: Path, change) -> None:
    """Rewrite the specification after `change(main block)`."""
    spec = message_module("Model_pb2").Model()
    spec.ParseFromString((package / SPEC).read_bytes())
    function = spec.mlProgram.functions["main"]
    change(function.block_specializations[function.opset])
    (package / SPEC).write_bytes(spec.SerializeToString())


def refused(package: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        MilModel(package)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_weights_come_from_the_file_on_disk(package):
    x = np.random.default_rng(1).standard_normal((1, 32)).astype(np.float32)
    first = next(iter(MilModel(package)({"x": x}).values()))
    np.testing.assert_allclose(first, x @ WEIGHT.T + WEIGHT[0], rtol=1e-5, atol=1e-5)
    start = struct.unpack_from("<Q", (package / BLOB).read_bytes(), 64 + 16)[0]
    changed = WEIGHT.copy()
    changed[3, 5] += 1
    patch(package / BLOB, start, changed.tobytes())
    second = next(iter(MilModel(package)({"x": x}).values()))
    np.testing.assert_allclose(second - first, np.eye(32, dtype=np.float32)[3:4] * x[0, 5], atol=1e-5)


@pytest.mark.parametrize("size", [0, 63, 64, 100, 4000])
def test_truncated_weights(package, size):
    (package / BLOB).write_bytes((package / BLOB).read_bytes()[:size])
    refused(package, "weight.bin")


@pytest.mark.parametrize(
    ("offset", "data", "why"),
    [
        (4, struct.pack("<I", 1), "storage version 1"),
        (64, b"\0\0\0\0", "0xdeadbeef"),
        (68, struct.pack("<I", 1), "element type 1"),
        (72, struct.pack("<Q", 8), "8 bytes"),
        (72, struct.pack("<Q", 1 << 60), "bytes"),
        (80, struct.pack("<Q", 1 << 60), "its data would be at"),
        (80, struct.pack("<Q", 129), "its data would be at"),
    ],
)
def test_damaged_metadata(package, offset, data, why):
    patch(package / BLOB, offset, data)
    refused(package, "weight.bin", why)


@pytest.mark.parametrize("offset", [0, 1, 65, 1 << 40])
def test_offsets_that_are_none(package, offset):
    def change(block):
        for operation in block.operations:
            value = operation.attributes["val"] if operation.type == "const" else None
            if value is not None and value.WhichOneof("value") == "blobFileValue":
                value.blobFileValue.offset = offset

    edit(package, change)
    refused(package, "weight.bin", f"at offset {offset}")


@pytest.mark.parametrize("name", ["@model_path/../../../Manifest.json", "/etc/passwd", "@model_path/weights/none.bin"])
def test_weights_elsewhere(package, name):
    def change(block):
        for operation in block.operations:
            if operation.type == "const" and operation.attributes["val"].WhichOneof("value") == "blobFileValue":
                operation.attributes["val"].blobFileValue.fileName = name

    edit(package, change)
    refused(package, "a.mlpackage")


def test_an_unknown_operator_is_named_with_the_nearest(package):
    def change(block):
        next(o for o in block.operations if o.type == "linear").type = "linaer"

    edit(package, change)
    refused(package, "no operator 'linaer'", "did you mean 'linear'?")


def test_a_value_that_nothing_computes(package):
    def change(block):
        next(o for o in block.operations if o.type == "linear").inputs["x"].arguments[0].name = "ghost"

    edit(package, change)
    refused(package, "linear", "reads 'ghost'")


def test_a_constant_with_too_few_values(package):
    def change(block):
        weight = next(o for o in block.operations if o.type == "const")
        weight.attributes["val"].immediateValue.tensor.floats.values.extend([1.0, 2.0])

    edit(package, change)
    refused(package, "2 values for a tensor of shape")


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"not a model"])
def test_a_specification_that_is_none(package, content):
    (package / SPEC).write_bytes(content)
    refused(package, "model.mlmodel")


def test_manifests(package):
    manifest = json.loads((package / "Manifest.json").read_text())
    for change, word in (
        ({"rootModelIdentifier": "none"}, "names no root model"),
        ({"itemInfoEntries": 3}, "names no root model"),
        ({"itemInfoEntries": {manifest["rootModelIdentifier"]: {"path": "../../x"}}}, "points outside"),
        ({"itemInfoEntries": {manifest["rootModelIdentifier"]: {"path": "com.apple.CoreML/none"}}}, "no such file"),
    ):
        (package / "Manifest.json").write_text(json.dumps({**manifest, **change}))
        refused(package, word)
    (package / "Manifest.json").write_text("{")
    refused(package, "Manifest.json", "not valid JSON")
    (package / "Manifest.json").unlink()
    refused(package, "Manifest.json", "no such file")


def test_links_out_of_the_package(package, tmp_path):
    (tmp_path / "weights").mkdir()
    shutil.move(package / BLOB, tmp_path / "weights" / "weight.bin")
    (package / BLOB).symlink_to(tmp_path / "weights" / "weight.bin")
    refused(package, "points outside")
    (package / BLOB).unlink()
    (package / BLOB.parent).rmdir()
    (package / BLOB.parent).symlink_to(tmp_path / "weights", target_is_directory=True)
    refused(package, "weights")


def test_a_missing_package(tmp_path):
    with pytest.raises(UserError, match=r"no such \.mlpackage directory"):
        Package(tmp_path / "none.mlpackage")


def test_a_function_that_is_not_there(whole):
    with pytest.raises(UserError, match="no function 'mian': did you mean 'main'"):
        MilModel(whole, "mian")
