"""Exports that are verified by one layer of each kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.check import verify_bundle
from export.pipeline import ExportOptions, export
from export.sample import Sample, float32_bytes
from export.stages import silent
from export.targets.ort_linear import Blocks
from graphs.errors import GateError, UserError
from graphs.model import Request, load_model
from graphs.shorten import superfluous
from graphs.trace import trace
from runtimes.manifest import Bundle
from runtimes.session import Session

NANO = Request("mobilevlm", checkpoint="zoo:mobilevlm-nano")
RECIPE = '[[layers]]\nmatch = "text_decoder/*"\nkind = "linear"\nschemes = ["w4g32a8b"]\n'


def options(directory: Path, **more: str) -> ExportOptions:
    recipe = directory / "own.toml"
    recipe.write_text(RECIPE)
    return ExportOptions(NANO, "onnxruntime", str(recipe), out=directory / "bundle", **more)  # type: ignore[arg-type]


def test_a_sampled_bundle_is_whole_and_verifies_again(tmp_path: Path) -> None:
    out = export(options(tmp_path, verify="sample"), silent)
    manifest = json.loads((out / "manifest.json").read_text())
    assert {method: len(paths) for method, paths in manifest["left_out"].items()} == {
        "vision_encoder": 3,
        "text_decoder": 3,
    }
    assert manifest["details"]["methods"]["text_decoder"]["operators"]["MatMulNBits"] == 17
    assert all(entry["lower"]["passed"] for entry in manifest["verification"].values())
    assert 0 < manifest["verification"]["text_decoder"]["quantize"]["relative_l2"] < 0.5
    assert not [path for path in out.iterdir() if path.is_dir()]
    assert all(entry["passed"] for entry in verify_bundle(out, silent).values())
    whole = Session.open(Bundle.open(out))
    assert len(whole.runtime.signatures["text_decoder"].state) == 8


def test_a_fault_in_lowering_a_layer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Blocks.weight
    monkeypatch.setattr(Blocks, "weight", lambda self, q: right(self, q.roll(1, 0)))
    with pytest.raises(GateError, match="text_decoder"):
        export(options(tmp_path, verify="sample"), silent)
    assert [path.name for path in tmp_path.iterdir()] == ["own.toml"]


def test_small_programs_are_run_whole_unless_asked() -> None:
    model = load_model(NANO)
    program = trace(model.architecture, model.weights)
    assert 10e6 < float32_bytes(program) < 30e6
    assert Sample.choose(program, program, "auto").without == {}
    sample = Sample.choose(program, program, "sample")
    assert sample.without == {method: paths for method, paths in superfluous(program).items() if paths}
    assert Sample.from_json(json.loads(json.dumps(sample.to_json()))) == sample
    assert Sample().to_json() is None
    assert Sample().of(program) is program


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--verify smaple is unknown.*sample"):
        export(options(tmp_path, verify="smaple"), silent)
    with pytest.raises(UserError, match="what was checked is damaged"):
        Sample.from_json({"text_decoder": "layers.0"})
