"""Qwen2-VL and Tarsier2 from checkpoints that transformers' class wrote: the same patches, logits and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.qwen2_vl import Qwen2VL
from graphs.architectures.tarsier2 import Tarsier2
from graphs.dialogue import Dialogue
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.graphs.architectures import qwen
from tests.graphs.architectures.qwen import TEXT
from tests.numbers import relative_l2
from tests.published import counted

VISION = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 48,
    "mlp_ratio": 2,
    "num_heads": 2,
    "patch_size": 4,
}
CASES: dict[str, dict[str, Any]] = {
    "published shape": {},
    "odd": {
        "vision": {
            **VISION,
            "embed_dim": 36,
            "hidden_size": 60,
            "num_heads": 3,
            "mlp_ratio": 3,
            "patch_size": 3,
            "spatial_merge_size": 3,
            "temporal_patch_size": 3,
            "hidden_act": "gelu",
        },
        "text": {
            **TEXT,
            "hidden_size": 60,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 2, 2]},
        },
    },
    "tied": {"tie_word_embeddings": True},
}
MODULES = {"visual.": "model.visual.", "model.": "model.language_model.", "lm_head.": "lm_head."}
SHELL = {"visual.": "vision_tower.", "model.": "language_model.model.", "lm_head.": "language_model.lm_head."}


def reference(
    directory: Path, vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT, **options: Any
) -> tuple[Any, Any]:
    return qwen.reference(Qwen2VLForConditionalGeneration, Qwen2VLConfig, directory, vision, text, **options)


def flat_config(directory: Path) -> dict[str, Any]:
    """The configuration as the hub's files have it: the decoder's keys at the top."""
    written = json.loads((directory / "config.json").read_text())
    text = written.pop("text_config")
    rope = {"type": "mrope", "mrope_section": text.pop("rope_parameters")["mrope_section"]}
    return {**text, **written, "rope_theta": 1e4, "rope_scaling": rope, "model_type": "qwen2_vl"}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made, images = reference(tmp_path, **CASES[case])
    model = load_model(Request("qwen2_vl", checkpoint=str(tmp_path)))
    assert isinstance(model.architecture, Qwen2VL)
    qwen.compare(made, images, model)


def test_patches_are_transformers(tmp_path: Path) -> None:
    _, images = reference(tmp_path)
    processor = load_model(Request("qwen2_vl", checkpoint=str(tmp_path))).architecture.image_processor
    assert processor is not None
    for shown in qwen.pictures():
        made, expected = processor.picture(shown), images(shown, return_tensors="pt")
        assert relative_l2(qwen.unpatched(made), expected["pixel_values"]) <= 1e-6
        assert made.text.count("<|image_pad|>") == expected["image_grid_thw"].prod() // 4


@pytest.mark.parametrize(("row", "names"), [("qwen2_vl", MODULES), ("tarsier2", SHELL)])
def test_other_layouts_are_the_same_model(row: str, names: dict[str, str], tmp_path: Path) -> None:
    made, images = reference(tmp_path)
    config = flat_config(tmp_path)
    shell = {"model_type": "llava", "vision_config": config["vision_config"], "text_config": config}
    qwen.renamed(tmp_path, names, shell if names is SHELL else config)
    model = load_model(Request(row, checkpoint=str(tmp_path)))
    assert isinstance(model.architecture, Tarsier2) == (row == "tarsier2")
    qwen.compare(made, images, model)


def test_text_behind_a_long_video_follows_its_last_moment(tmp_path: Path) -> None:
    """As published (one more than the largest position); transformers 5 lets it overlap with the video's end."""
    made, images = reference(tmp_path)
    model = load_model(Request("qwen2_vl", checkpoint=str(tmp_path)))
    assert model.architecture.image_processor is not None
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    moving = qwen.frames(15)
    picture = model.architecture.image_processor.picture([frame.resize((16, 16)) for frame in moving])
    inputs = qwen.video_inputs(images, [frame.resize((16, 16)) for frame in moving])
    segments, ids, _ = qwen.conversation([(qwen.VIDEO, picture)])
    prompt = Dialogue(runtime).embed(segments)
    assert prompt.rope_3S[:, 4:].max(1).tolist() == [14, 14, 14]
    assert prompt.rope_3S[:, -3:].tolist() == [[12, 13, 14]] * 3  # eight moments from 4 on
    with torch.no_grad():
        expected = made(ids, **inputs, position_ids=torch.from_numpy(prompt.rope_3S.copy()).unsqueeze(1)).logits
    runtime.reset()
    positions = [np.arange(ids.shape[1]), np.ascontiguousarray(prompt.rope_3S)]
    (logits,) = runtime.call("text_decoder", [prompt.embeds_1SD, *positions])
    assert relative_l2(torch.from_numpy(logits), expected) <= 1e-5


def test_bundle_answers_as_transformers_does(tmp_path: Path) -> None:
    made, images = reference(tmp_path / "made")
    request = Request("qwen2_vl", checkpoint=str(tmp_path / "made"), max_context=256)
    bundle = export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    tokenizer = qwen.tokenizer()
    for shown in ([], qwen.pictures()[:1], qwen.pictures()[2:4]):
        answer, _ = session.answer("Hm?", shown, max_new_tokens=8)
        assert session.processor is not None
        head, *rest = session.template.render("Hm?", len(shown)).split("<|image_pad|>")
        texts = [session.processor.picture(picture).text for picture in shown]
        text = head + "".join(picture + behind for picture, behind in zip(texts, rest, strict=True))
        ids = torch.tensor([tokenizer.encode(text)])
        inputs = dict(images(shown, return_tensors="pt")) if shown else {}
        kinds = {"mm_token_type_ids": (ids == qwen.IMAGE).int()} if shown else {}
        tokens = made.generate(ids, **inputs, **kinds, do_sample=False, max_new_tokens=8)
        expected = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer == expected.strip()


@pytest.mark.parametrize("architecture", [Qwen2VL, Tarsier2])
def test_published_sizes_count(architecture: type[Qwen2VL]) -> None:
    counted(architecture)


def test_pictures_fit_into_half_of_the_context() -> None:
    published = next(v.architecture for v in Qwen2VL.variants() if v.name == "qwen2-vl-2b")
    assert isinstance(published, Qwen2VL)
    assert published.visual_tokens == 1024
    arrays = published.image_processor(Image.new("RGB", (4000, 3000)))
    assert arrays[0].shape == (972, 4, 1176)  # 27 x 36, the largest of that shape below 1024
    with pytest.raises(UserError, match="200 to 1"):
        published.image_processor(Image.new("RGB", (3000, 10)))
    with pytest.raises(UserError, match="more embeddings than the 1024"):
        published.image_processor([Image.new("RGB", (56, 56))] * 3000)
    with pytest.raises(UserError, match="no frames"):
        published.image_processor([])


@pytest.mark.parametrize(
    ("change", "preprocessor", "words"),
    [
        ({"vision_config": {"hidden_size": 64}}, {}, "hidden_size is 64, the decoder's hidden_size is 8192"),
        ({"vision_config": {"embed_dim": 1288, "hidden_size": 8192}}, {}, "width 1288 does not split into 16 heads"),
        ({"vision_config": {"hidden_act": "swish2", "hidden_size": 8192}}, {}, "hidden_act is 'swish2'"),
        ({}, {"patch_size": 16}, "patch_size is 16, the tower's is 14"),
        ({}, {"do_resize": False}, "do_resize is false"),
        ({}, {"min_pixels": 4000, "max_pixels": 3000}, "min_pixels 4000 is above max_pixels 3000"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, {}, "mrope_section sums to 6"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], preprocessor: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Qwen2VL.from_config(change, preprocessor)
