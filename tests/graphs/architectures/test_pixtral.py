"""Pixtral from checkpoints that transformers' class wrote: the same patches, embeddings, logits, tokens and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.pixtral.image_processing_pil_pixtral import (
    PixtralImageProcessorPil,
    get_resize_output_image_size,
)

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.pixtral import Pixtral
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.image import CLIP_MEAN, CLIP_STD
from graphs.preprocess.raster import RasterProcessor
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.lowered import lowers
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, photographs, randomized, save
from tests.published import counted

MEAN, STD = (torch.tensor(values).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 8,
    "hidden_act": "silu",
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 512,
    "sliding_window": None,
    "head_dim": 16,
    "eos_token_id": 257,
}
CASES: dict[str, dict[str, Any]] = {
    "published shape": {},
    "odd": {
        "vision": {
            **VISION,
            "hidden_size": 60,
            "num_attention_heads": 5,
            "image_size": 50,
            "patch_size": 7,
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "axial", "rope_theta": 300.0},
        },
        "decoder": LlamaConfig,
        "options": {"vision_feature_layer": -2, "multimodal_projector_bias": False, "tie_word_embeddings": True},
    },
}


def tokenizer() -> PreTrainedTokenizerFast:
    names = {"image_token": "[IMG]", "break_token": "[IMG_BREAK]", "end_token": "[IMG_END]"}
    return byte_tokenizer(extra_special_tokens=names)


def reference(
    directory: Path,
    vision: dict[str, Any] = VISION,
    decoder: type = MistralConfig,
    options: dict[str, Any] | None = None,
) -> tuple[Any, PixtralImageProcessorPil]:
    """A model and its processor of pictures, both written into `directory`, and the tokenizer."""
    options = {"vision_feature_layer": -1, **(options or {})}
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**vision),
        text_config=decoder(**TEXT, tie_word_embeddings=options.get("tie_word_embeddings", False)),
        image_token_index=tokenizer().convert_tokens_to_ids("[IMG]"),
        vision_feature_select_strategy="full",
        **options,
    )
    made = randomized(LlavaForConditionalGeneration(config))
    side = {"height": vision["patch_size"], "width": vision["patch_size"]}
    images = PixtralImageProcessorPil(patch_size=side, size={"longest_edge": vision["image_size"]})
    save(made, directory)
    images.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return made, images


def lines(height: int, width: int, side: int) -> str:
    """How transformers' processor, which needs torchvision, writes a picture of `height` x `width` pixels."""
    rows = [["[IMG]"] * (width // side) + ["[IMG_BREAK]"] for _ in range(height // side)]
    rows[-1][-1] = "[IMG_END]"
    return "".join(token for row in rows for token in row)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made, images = reference(tmp_path, **CASES[case])
    model = load_model(Request("pixtral", checkpoint=str(tmp_path)))
    architecture = model.architecture
    assert isinstance(architecture, Pixtral)
    runtime = EagerRuntime(trace(architecture, model.weights))
    words, side = tokenizer(), architecture.vision.patch_size
    grids = set()
    with torch.no_grad():
        for photograph in photographs():
            seen = architecture.image_processor.picture(photograph)
            given = images(photograph, return_tensors="pt")
            (height, width) = given["image_sizes"][0].tolist()
            patches, position = (torch.from_numpy(array) for array in seen.arrays)
            normal = (patches / 255 - MEAN) / STD
            whole = normal.reshape(height // side, width // side, 3, side, side).permute(2, 0, 3, 1, 4)
            assert relative_l2(whole.reshape(3, height, width), given["pixel_values"][0]) <= 1e-6
            assert position[-1].tolist() == [height // side - 1, width // side - 1]
            assert seen.text == lines(height, width, side)
            (image_embeds,) = runtime.call("vision_encoder", seen.arrays)
            (features,) = made.get_image_features(**given).pooler_output
            assert relative_l2(torch.from_numpy(image_embeds[0]), features) <= 1e-5
            assert len(features) <= architecture.visual_tokens
            grids.add((height, width))
        assert len(grids) > 2
        for pictures in ([], photographs()[:2]):
            seen = [architecture.image_processor.picture(picture) for picture in pictures]
            text = "Look: " + "".join(f"{one.text} and " for one in seen)
            ids = words(text, return_tensors="pt")["input_ids"]
            given = dict(images(pictures, return_tensors="pt")) if pictures else {}
            runtime.reset()
            parts = [runtime.call("vision_encoder", one.arrays)[0][0] for one in seen]
            embeds = runtime.call("token_embedding", [ids.numpy()])[0]
            embeds[0, (ids[0] == made.config.image_token_id).numpy()] = np.concatenate([embeds[0][:0], *parts])
            (logits,) = runtime.call("text_decoder", [embeds, np.arange(ids.shape[1])])
            assert relative_l2(torch.from_numpy(logits), made(ids, **given).logits) <= 1e-5


LAYOUTS: dict[str, list[tuple[str, str]]] = {
    "in memory": [
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ]
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_public_layouts_hold_the_same(layout: str, tmp_path: Path) -> None:
    made, _ = reference(tmp_path / "a")
    made.save_pretrained(tmp_path / "c")
    renamed = {}
    for name, tensor in load_file(tmp_path / "c" / "model.safetensors").items():
        old, new = next(rule for rule in LAYOUTS[layout] if name.startswith(rule[0]))
        renamed[new + name.removeprefix(old)] = tensor
    (tmp_path / "b").mkdir()
    save_file(renamed, tmp_path / "b" / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "b" / name).write_text((tmp_path / "a" / name).read_text())
    one, other = (load_model(Request("pixtral", checkpoint=str(tmp_path / name))) for name in "ab")
    assert one.architecture == other.architecture
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


@pytest.mark.parametrize("target", ["onnxruntime", "executorch"])
def test_bundles_answer_as_transformers_does(target: str, tmp_path: Path) -> None:
    made, images = reference(tmp_path / "made")
    request = Request("pixtral", checkpoint=str(tmp_path / "made"), max_context=192)
    bundle = export(ExportOptions(request, target, "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    words = tokenizer()
    for pictures in ([], photographs()[:1], photographs()[1:3]):
        answer, _ = session.answer("Hm?", pictures, max_new_tokens=8)
        assert session.template.render("Hm?", len(pictures)) == f"[INST]{'[IMG]' * len(pictures)}Hm?[/INST]"
        given = dict(images(pictures, return_tensors="pt")) if pictures else {}
        sizes = given["image_sizes"].tolist() if pictures else []
        shown = "".join(lines(height, width, VISION["patch_size"]) for height, width in sizes)
        ids = words(f"[INST]{shown}Hm?[/INST]", return_tensors="pt")["input_ids"]
        tokens = made.generate(ids, **given, do_sample=False, max_new_tokens=8)
        assert answer == words.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("target", ["coreml", "tensorrt"])
def test_tiny_lowers(target: str, tmp_path: Path) -> None:
    lowers(Request("pixtral", "tiny"), target, tmp_path / "b")


def test_sizes_are_transformers() -> None:
    processor = RasterProcessor(16, 1024, 1024)
    sizes = np.random.default_rng(0).integers(8, 3000, (300, 2)).tolist()
    for height, width in [(1024, 1024), (1025, 3), (16, 16), (17, 15), *sizes]:
        expected = get_resize_output_image_size(np.empty((3, height, width), np.uint8), 1024, 16, "channels_first")
        assert tuple(16 * count for count in processor.grid(height, width)) == expected
    assert processor.grid(1, 5000) == (1, 64)


def test_published_sizes_count() -> None:
    for variant in counted(Pixtral):
        assert isinstance(variant.architecture, Pixtral)
        assert variant.architecture.visual_tokens == 64 * 64


def test_absent_keys_are_transformers_defaults() -> None:
    """config.json of mistral-community/pixtral-12b, which says only what differs from the classes' defaults."""
    config = {
        "text_config": {
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "max_position_embeddings": 1024000,
            "model_type": "mistral",
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e9,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "vision_config": {"hidden_act": "silu", "image_size": 1024, "model_type": "pixtral", "patch_size": 16},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    published = Pixtral.variants()[-1].architecture
    found = Pixtral.from_config(config)
    assert isinstance(published, Pixtral)
    assert (found.vision, found.text) == (published.vision, published.text)
    expected = PixtralVisionConfig()
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(found.vision, key) == getattr(expected, key)
    assert expected.rope_parameters["rope_theta"] == found.vision.rope_theta


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_config": {"model_type": "pixtal"}}, "pixtral"),
        ({"vision_config": {"model_type": "pixtral", "hidden_size": 1000}}, "heads of a multiple of 4"),
        ({"vision_config": {"model_type": "pixtral", "rope_parameters": {"rope_type": "yarn"}}}, "axial"),
        ({"vision_feature_select_strategy": "default"}, "choose full"),
        ({"vision_feature_layer": 25}, "vision_feature_layer is 25"),
        ({"text_config": {"model_type": "mixtral"}}, "mistral"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    config = {"vision_config": {"model_type": "pixtral"}, "vision_feature_select_strategy": "full", **change}
    with pytest.raises(UserError, match=words):
        Pixtral.from_config(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": {"height": 14, "width": 14}}, "this tower takes patches of 16 x 16"),
        ({"do_resize": False}, "do_resize is false"),
        ({"do_center_crop": True}, "seen whole"),
    ],
)
def test_pictures_that_the_tower_does_not_take_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        RasterProcessor.from_config(change, 16, 1024)
