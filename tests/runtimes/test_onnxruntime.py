"""Damaged and hostile ONNX files: one line, before ONNX Runtime sees them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from export.gate import Limit
from export.targets.base import LowerOptions
from export.targets.onnxruntime import TARGET
from graphs.errors import UserError
from runtimes.base import Artifact, load_runtime
from tests.tiny import tiny_program


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    directory = tmp_path_factory.mktemp("good")
    program = tiny_program("tiny")
    made = TARGET.lower(
        TARGET.legalize(program), directory, LowerOptions("float32", dict.fromkeys(program, Limit(1e-4)))
    )
    signatures = {name: traced.signature for name, traced in program.methods.items()}
    return Artifact(directory, signatures, made.files, made.details)


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return damage


def overwrite(name: str, data: bytes) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).write_bytes(data)

    return damage


def redirect(key: str, value: str) -> Callable[[Path], None]:
    """Let the first external tensor of the decoder point elsewhere."""

    def damage(directory: Path) -> None:
        path = directory / "text_decoder.onnx"
        model = onnx.load_model(path, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
        next(entry for entry in tensor.external_data if entry.key == key).value = value
        path.write_bytes(model.SerializeToString())

    return damage


DAMAGE = {
    "data cut short": (cut("text_decoder.onnx.data", 0.5), "cut short or damaged"),
    "graph cut short": (cut("text_decoder.onnx", 0.5), "damaged, or not an ONNX file"),
    "empty graph": (overwrite("vision_encoder.onnx", b""), "damaged, or not an ONNX file"),
    "not ONNX": (overwrite("vision_encoder.onnx", b"\x89PNG\r\n" * 99), "damaged, or not an ONNX file"),
    "no data": (lambda directory: (directory / "text_decoder.onnx.data").unlink(), "no such file"),
    "data outside": (redirect("location", "../secret.data"), "points outside the directory"),
    "absolute data": (redirect("location", "/etc/hostname"), "points outside the directory"),
    "negative offset": (redirect("offset", "-8"), "cut short or damaged"),
    "no number": (redirect("length", "many"), "no number"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line(kind: str, good: Artifact, tmp_path: Path) -> None:
    damage, words = DAMAGE[kind]
    directory = tmp_path / "bundle"
    shutil.copytree(good.directory, directory)
    damage(directory)
    with pytest.raises(UserError, match=words) as error:
        load_runtime("onnxruntime", Artifact(directory, good.signatures, good.files, good.details))
    assert "\n" not in str(error.value)


def test_linked_data_outside(good: Artifact, tmp_path: Path) -> None:
    directory = tmp_path / "bundle"
    shutil.copytree(good.directory, directory)
    moved = (directory / "text_decoder.onnx.data").rename(tmp_path / "elsewhere.data")
    (directory / "text_decoder.onnx.data").symlink_to(moved)
    with pytest.raises(UserError, match="points outside its directory"):
        load_runtime("onnxruntime", Artifact(directory, good.signatures, good.files, good.details))


def test_sessions_are_configured_by_us_whatever_a_manifest_names(
    good: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtimes.onnxruntime.saturates", lambda: True)
    named = {"session.intra_op.allow_spinning": "0"}
    runtime: Any = load_runtime("onnxruntime", replace(good, details={**good.details, "without_vnni": named}))
    options = runtime.sessions["text_decoder"].session.get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
    with pytest.raises(RuntimeError, match="allow_spinning"):
        options.get_session_config_entry("session.intra_op.allow_spinning")


def test_version(good: Artifact) -> None:
    assert load_runtime("onnxruntime", good).version.startswith("onnxruntime 1.")
