"""Bundles: whole, verified, reproducible, and never half there."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.check import verify_bundle
from export.cli import main
from export.gate import Limit, gate
from export.pipeline import ExportOptions, export
from export.stages import silent
from export.targets.base import LIMITS
from export.verify import Call, relative_l2
from graphs.errors import GateError, UserError
from graphs.files import sha256
from graphs.model import Request
from graphs.safetensors_io import write_safetensors
from runtimes.manifest import Bundle
from runtimes.session import rebuild
from tests.checkpoints import reference, write

TINY = Request("mobilevlm", "tiny")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(ExportOptions(TINY, "onnxruntime", out=tmp_path_factory.mktemp("out") / "tiny"), silent)


def read(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return manifest


def test_the_manifest_tells_all(bundle: Path) -> None:
    manifest = read(bundle)
    assert manifest["source"]["weights"] == "random (seed 0)"
    assert set(manifest["methods"]) == {"vision_encoder", "token_embedding", "text_decoder"}
    assert manifest["methods"]["vision_encoder"]["inputs"][0]["dtype"] == "uint8"
    assert manifest["prompt"]["visual_tokens"] == 9
    assert (manifest["passes"], manifest["tokens"]) == ("", {"before": 9, "after": 9})
    for name, record in manifest["files"].items():
        data = (bundle / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (record["bytes"], record["sha256"])
    on_disk = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert on_disk == {*manifest["files"], "manifest.json"}
    for entry in manifest["verification"].values():
        assert entry["compress"] is None
        assert entry["quantize"] is None
        assert entry["lower"]["executed"] is True
        assert 0 <= entry["lower"]["relative_l2"] <= entry["lower"]["limit"] == 1e-4
    stages = {stage["name"]: stage for stage in manifest["stages"]}
    assert {"load", "trace", "compress", "calibrate", "quantize", "lower", "verify"} == set(stages)
    assert all(stage["peak_rss_bytes"] > 50 << 20 for stage in stages.values())


def test_nothing_in_a_bundle_names_the_machine(bundle: Path) -> None:
    root = str(Path(__file__).resolve().parents[2]).encode()
    assert not [path.name for path in bundle.rglob("*") if path.is_file() and root in path.read_bytes()]


def test_verify_measures_again(bundle: Path) -> None:
    entries = verify_bundle(bundle, silent)
    recorded = read(bundle)["verification"]
    for method, entry in entries.items():
        assert entry["relative_l2"] == pytest.approx(recorded[method]["lower"]["relative_l2"], abs=1e-6)


def copy_of(bundle: Path, place: Path) -> Path:
    import shutil

    shutil.copytree(bundle, place)
    return place


def test_verify_finds_a_changed_weight_by_hash(bundle: Path, tmp_path: Path) -> None:
    changed = copy_of(bundle, tmp_path / "b")
    data = bytearray((changed / "text_decoder.onnx.data").read_bytes())
    data[1000] ^= 0x40
    (changed / "text_decoder.onnx.data").write_bytes(data)
    with pytest.raises(UserError, match=r"text_decoder\.onnx\.data is not the file"):
        verify_bundle(changed, silent)


def test_verify_finds_wrong_numbers_behind_right_hashes(bundle: Path, tmp_path: Path) -> None:
    changed = copy_of(bundle, tmp_path / "b")
    weights = np.fromfile(changed / "vision_encoder.onnx.data", dtype=np.float32)
    (weights * 1.01).astype(np.float32).tofile(changed / "vision_encoder.onnx.data")
    manifest = read(changed)
    data = (changed / "vision_encoder.onnx.data").read_bytes()
    manifest["files"]["vision_encoder.onnx.data"]["sha256"] = hashlib.sha256(data).hexdigest()
    (changed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(GateError, match="vision_encoder"):
        verify_bundle(changed, silent)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schema", 99, "schema 99"),
        (
            "methods",
            {"m": {"file": "../../etc/passwd", "inputs": [], "outputs": [], "state": []}},
            "outside the bundle",
        ),
        ("methods", [], "damaged"),
        ("limits", {"text_decoder": 5.0}, "limit"),
        ("limits", {"vision_encoder": {"relative_l2": 5.0}}, "limit"),
        ("limits", {"vision_encoder": {"relative_l2": 1e-4, "others": "all"}}, "limit"),
    ],
)
def test_a_hostile_manifest_is_refused(bundle: Path, tmp_path: Path, key: str, value: Any, words: str) -> None:
    changed = copy_of(bundle, tmp_path / "b")
    (changed / "manifest.json").write_text(json.dumps({**read(changed), key: value}))
    with pytest.raises(UserError, match=words):
        verify_bundle(changed, silent)


def test_a_gate_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, "float32", 1e-12)
    with pytest.raises(GateError, match="onnxruntime does not compute the model"):
        export(ExportOptions(TINY, "onnxruntime", out=tmp_path / "new" / "b"), silent)
    assert os.listdir(tmp_path) == []


def test_the_gate_sees_shapes_and_infinities() -> None:
    ones, more = [np.ones((1, 2), np.float32)], [np.ones((1, 3), np.float32)]
    assert relative_l2(ones, ones) == 0
    assert relative_l2(more, ones) == float("inf")
    assert relative_l2([np.array([[1, np.nan]], np.float32)], ones) == float("inf")
    assert relative_l2([ones[0] * 1.5], ones) == pytest.approx(0.5)
    entry = gate({"m": [Call([], more)]}, {"m": [Call([], ones)]}, {"m": Limit(1e-4)}, "x")["m"]
    assert entry["passed"] is False


def test_force_replaces_a_bundle_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["export", "mobilevlm", "--variant", "tiny", "--target", "onnxruntime", "--out", str(tmp_path / "b")]
    assert main([*command, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["bundle"] == str(tmp_path / "b")
    assert main([*command, "--quiet"]) == 0  # the same again: left as it is
    assert main([*command, "--quiet", "--seed", "1"]) == 2
    assert main([*command, "--quiet", "--force", "--seed", "1"]) == 0
    assert read(tmp_path / "b")["source"]["seed"] == 1
    assert os.listdir(tmp_path) == ["b"]


def test_a_checkpoint_of_other_dimensions_exports_without_tokenizer(tmp_path: Path) -> None:
    checkpoint = write(
        tmp_path / "fine-tune", reference(text={"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1})
    )
    request = Request("mobilevlm", checkpoint=str(checkpoint))
    manifest = read(export(ExportOptions(request, "onnxruntime", out=tmp_path / "b"), silent))
    assert manifest["methods"]["token_embedding"]["outputs"][0]["shape"][2] == 56
    assert manifest["prompt"]["takes"].startswith("tensors only")
    assert Bundle.open(tmp_path / "b").check_files() == len(manifest["files"])


KILLED_AT = ("[2/8]", "[5/8]", "text_decoder: writing", "[7/8]", "[8/8]")


@pytest.mark.parametrize("moment", KILLED_AT)
def test_a_killed_export_leaves_no_bundle_or_a_whole_one(moment: str, tmp_path: Path) -> None:
    out = tmp_path / "b"
    arguments = ["export", "mobilevlm", "--variant", "tiny", "--target", "onnxruntime", "--out", str(out)]
    code = "import sys; from export.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if moment in line:
                break
        process.send_signal(signal.SIGKILL)
    if out.exists():
        assert verify_bundle(out, silent)
        return
    export(ExportOptions(TINY, "onnxruntime", out=out), silent)
    assert verify_bundle(out, silent)
    assert os.listdir(tmp_path) == ["b"]


def test_weights_of_a_pass_are_told_by_their_hash(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    write_safetensors(path, {"weight": torch.full((64, 576), 0.01), "bias": torch.zeros(64)})
    passes = f"pixel_shuffle{{factor=3,weights={path}}}"
    out = export(ExportOptions(TINY, "onnxruntime", compress=passes, out=tmp_path / "b"), silent)
    assert read(out)["passes_read"] == {str(path): sha256(path)}
    assert rebuild(Bundle.open(out)).methods["vision_encoder"].signature.outputs[0].shape[1] == 1
    write_safetensors(path, {"weight": torch.full((64, 576), 0.02), "bias": torch.zeros(64)})
    with pytest.raises(UserError, match="is not the file that this bundle's passes were given"):
        rebuild(Bundle.open(out))
