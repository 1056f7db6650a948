"""Quantized bundles of the trained nano, from recipe to answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibration.samples import zoo_samples
from calibration.source import Calibration
from export.check import verify_bundle
from export.pipeline import ExportOptions, export
from export.stages import silent
from export.verify import compare, inputs_of, load_vectors, record
from graphs.errors import UserError
from graphs.model import Request
from runtimes.eager import EagerRuntime
from runtimes.manifest import Bundle
from runtimes.session import Session, rebuild

NANO = Request("mobilevlm", checkpoint="zoo:mobilevlm-nano")


def made(target: str, recipe: str, out: Path, **more: Any) -> dict[str, Any]:
    options = ExportOptions(NANO, target, recipe, Calibration(count=8), out=out, **more)
    manifest: dict[str, Any] = json.loads((export(options, silent) / "manifest.json").read_text())
    return manifest


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("balanced") / "bundle"
    return out, made("onnxruntime", "mobile-balanced", out, compress="prune{keep=18,method=cls_attention}")


def test_the_manifest_says_what_was_done(balanced: tuple[Path, dict[str, Any]]) -> None:
    _, manifest = balanced
    assert manifest["recipe"] == "mobile-balanced"
    assert manifest["tokens"] == {"before": 36, "after": 18}
    assert manifest["quantization"]["schemes"] == {
        "vision_encoder": {"w8a8": 26},
        "token_embedding": {"w8": 1},
        "text_decoder": {"w4g32a8b": 28, "w8g32a8b": 1},
    }
    origin = manifest["calibration"]
    assert (origin["data"], origin["count"], origin["seed"]) == ("zoo", 8, 0)
    assert origin["tokens"]["image"] == 8 * 18
    for entry in manifest["verification"].values():
        assert entry["lower"]["passed"]
        assert 0 < entry["quantize"]["relative_l2"] < 0.5
    operators = manifest["details"]["methods"]["text_decoder"]["operators"]
    assert operators["MatMulNBits"] == 17
    assert manifest["files"]["text_decoder.onnx.data"]["bytes"] < 1.4e6  # 1.9 M weights of four bits, scales, the head
    stored = sum(record["bytes"] for name, record in manifest["files"].items() if name.endswith(".onnx.data"))
    assert stored == pytest.approx(manifest["weight_bytes"], rel=0.05)


def test_the_bundle_verifies_and_answers(balanced: tuple[Path, dict[str, Any]]) -> None:
    out, _ = balanced
    assert all(entry["passed"] for entry in verify_bundle(out, silent).values())
    session = Session.open(Bundle.open(out))
    asked = [s for s in zoo_samples(28, 3) if s.task in ("color", "shape", "count", "words")]
    right = [session.answer(s.question, s.images)[0] == s.answer for s in asked]
    assert sum(right) >= 0.85 * len(right)


def test_the_quantized_graph_can_be_made_again(balanced: tuple[Path, dict[str, Any]]) -> None:
    bundle = Bundle.open(balanced[0])
    vectors = load_vectors(balanced[0] / "vectors.safetensors", bundle.artifact.signatures)
    again = record(EagerRuntime(rebuild(bundle)), inputs_of(vectors))
    assert max(entry["relative_l2"] for entry in compare(again, vectors).values()) == 0.0


def test_a_package_of_four_bit_weights_is_as_small_as_promised(tmp_path: Path) -> None:
    manifest = made("coreml", "mobile-small", tmp_path / "bundle")
    beside = ("vectors.safetensors", "tokenizer.json", "tokenizer_config.json")
    size = sum(record["bytes"] for name, record in manifest["files"].items() if name not in beside)
    size += (tmp_path / "bundle" / "manifest.json").stat().st_size
    assert 2.4e6 < manifest["weight_bytes"] < size < 1.05 * manifest["weight_bytes"]


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text('[[layers]]\nmatch = "text_decoder/*"\nkind = "linear"\nschemes = ["w4g64z"]\nscales = "mse"\n')
    manifest = made("onnxruntime", str(recipe), tmp_path / "bundle")
    assert manifest["quantization"]["schemes"] == {"text_decoder": {"w4g64z": 29}}
    assert manifest["calibration"] is None
    assert manifest["verification"]["text_decoder"]["lower"]["passed"]


@pytest.mark.parametrize(
    ("recipe", "schemes"),
    [
        ("mobile-balanced", {"image_encoder": {"w8a8t": 18}, "text_encoder": {"w8a8t": 13}}),
        ("mobile-small", {"image_encoder": {"w4g32a8b": 18}, "text_encoder": {"w4g32a8b": 13}}),
    ],
)
def test_what_cannot_be_calibrated_is_quantized_by_weights_alone(
    tmp_path: Path, recipe: str, schemes: dict[str, dict[str, int]]
) -> None:
    options = ExportOptions(Request("siglip", "tiny"), "onnxruntime", recipe, out=tmp_path / "bundle")
    manifest = json.loads((export(options, silent) / "manifest.json").read_text())
    assert manifest["quantization"]["schemes"] == schemes
    assert manifest["calibration"] is None
    for method, widest in (("image_encoder", 0.3), ("text_encoder", 0.3), ("similarity", 0.0)):
        entry = manifest["verification"][method]
        assert entry["lower"]["passed"]
        assert (entry["quantize"]["relative_l2"] > 0.0) == (widest > 0.0)
        assert entry["quantize"]["relative_l2"] <= widest


def test_static_ranges_of_what_cannot_be_calibrated_are_refused(tmp_path: Path) -> None:
    options = ExportOptions(Request("siglip", "tiny"), "coreml", "server-int8", out=tmp_path / "bundle")
    with pytest.raises(UserError, match=r"w8a8.*set by calibration.*choose recipe mobile-balanced"):
        export(options, silent)
    assert not list(tmp_path.iterdir())


def test_encoders_of_text_are_quantized_too(tmp_path: Path) -> None:
    options = ExportOptions(
        Request("florence2", "tiny"), "onnxruntime", "mobile-balanced", Calibration(count=2), out=tmp_path / "bundle"
    )
    manifest = json.loads((export(options, silent) / "manifest.json").read_text())
    assert manifest["quantization"]["schemes"]["text_encoder"] == {"w8a8t": 16}
    assert manifest["verification"]["text_encoder"]["lower"]["passed"]


@pytest.mark.parametrize(
    ("target", "recipe", "told"),
    [
        ("executorch", "server-fp8", "executorch has no kernels for f8af8 in linear layers"),
        ("executorch", "reference-fp16", "executorch does not take recipe 'reference-fp16'.*float32"),
        ("onnxruntime", "mobile-balancd", "did you mean 'mobile-balanced'|mobile-balanced"),
    ],
)
def test_refusals_leave_nothing(tmp_path: Path, target: str, recipe: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        made(target, recipe, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
