"""Compressed encoders on every target, through the whole export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.check import verify_bundle
from export.pipeline import ExportOptions, export
from export.stages import silent
from export.verify import load_vectors, record
from graphs.model import Request
from runtimes.eager import EagerRuntime
from runtimes.manifest import VECTORS, Bundle
from runtimes.session import Session, rebuild

#: between them, all operators that the rules are made of; and what is done to decoders
PASSES = (
    "prune{keep=7,method=visionzip,seed=0}",
    "prune{keep=5,method=tome,seed=0}",
    "prune{keep=4,method=divprune,seed=0}",
    "last_logits{}",
)


@pytest.mark.parametrize("target", ["coreml", "executorch", "onnxruntime", "tensorrt"])
def test_rules_and_last_logits_pass_the_gate(target: str, tmp_path: Path) -> None:
    options = ExportOptions(Request("mobilevlm", "tiny"), target, compress=";".join(PASSES), out=tmp_path / "b")
    manifest = json.loads((export(options, silent) / "manifest.json").read_text())
    assert manifest["passes"] == ";".join(PASSES)
    assert manifest["tokens"] == {"before": 9, "after": 4}
    assert manifest["prompt"]["visual_tokens"] == 4
    assert manifest["methods"]["vision_encoder"]["outputs"][0]["shape"] == [1, 4, 64]
    verified = manifest["verification"]
    assert verified["token_embedding"]["compress"] is None
    assert manifest["methods"]["text_decoder"]["outputs"][0]["shape"][1] == 1
    assert verified["text_decoder"]["compress"]["of"] == "outputs"
    assert verified["text_decoder"]["compress"]["relative_l2"] < 1e-6
    assert verified["vision_encoder"]["compress"]["of"] == "mean over tokens"
    assert 1e-3 < verified["vision_encoder"]["compress"]["relative_l2"] < 1
    for lower in (verified[name]["lower"] for name in ("vision_encoder", "text_decoder")):
        if target == "tensorrt":
            assert "relative L2" in lower["checked"]
            assert "built by" in lower["checked"]
        else:
            assert lower["executed"]
            assert lower["relative_l2"] <= lower["limit"]


@pytest.mark.parametrize("target", ["coreml", "executorch"])  # the rules go to every target above
def test_passes_before_behind_and_past_the_projector_pass_the_gate(target: str, tmp_path: Path) -> None:
    text = "pixel_shuffle{factor=3};ldp{version=1};decoder_prune{layer=1,keep=1}"
    options = ExportOptions(Request("mobilevlm", "tiny-v2"), target, compress=text, out=tmp_path / "b")
    manifest = json.loads((export(options, silent) / "manifest.json").read_text())
    assert manifest["tokens"] == {"before": 144, "after": 4}
    assert manifest["methods"]["text_decoder"]["state"][-1]["shape"] == [1, 192]
    verified = manifest["verification"]
    assert verified["token_embedding"]["compress"]["relative_l2"] == 0
    assert 1e-4 < verified["text_decoder"]["compress"]["relative_l2"] < 1  # seeded inputs are marked at random
    for name in ("vision_encoder", "text_decoder"):
        lower = verified[name]["lower"]
        assert lower["executed"]
        assert lower["relative_l2"] <= lower["limit"]


def test_the_trained_model_answers_with_half_its_tokens(tmp_path: Path) -> None:
    text = "prune{keep=18,method=divprune}"
    out = export(ExportOptions(Request("mobilevlm"), "onnxruntime", compress=text, out=tmp_path / "b"), silent)
    assert verify_bundle(out, silent)["vision_encoder"]["relative_l2"] <= 1e-4
    bundle = Bundle.open(out)
    vectors = load_vectors(out / VECTORS, bundle.artifact.signatures)
    again = record(EagerRuntime(rebuild(bundle)), {name: [c.inputs for c in calls] for name, calls in vectors.items()})
    for name, calls in vectors.items():
        for call, repeated in zip(calls, again[name], strict=True):
            assert np.array_equal(call.outputs[0], repeated.outputs[0])
    session = Session.open(bundle)
    assert session.processor is not None
    side = bundle.manifest["prompt"]["image_size"]
    picture = [Image.new("RGB", (side, side), "white")]
    text_only = session.answer("How many objects are there?", [])[1].prompt_tokens
    assert session.answer("How many objects are there?", picture)[1].prompt_tokens > text_only + 17
