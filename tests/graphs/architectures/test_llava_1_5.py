"""LLaVA 1.5 from checkpoints that transformers' class wrote: the same embeddings, logits, tokens and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.llava_1_5 import Llava
from graphs.components.vision.clip import CLIP_LARGE_336
from graphs.dialogue import Dialogue
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.tokenizer import load_tokenizer
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.lowered import lowers
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, photographs, randomized, raw_pixels, save
from tests.published import counted

IMAGE = 119
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 120,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CASES: dict[str, dict[str, Any]] = {
    "published shape": {},
    "odd": {
        "vision": {**VISION, "hidden_size": 40, "num_attention_heads": 5, "image_size": 50, "patch_size": 7},
        "text": {**TEXT, "hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 10},
        "projector_hidden_act": "relu",
        "multimodal_projector_bias": False,
    },
    "tied": {"text": {**TEXT, "tie_word_embeddings": True, "num_key_value_heads": 2}},
    "whole last layer": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    "several layers": {"vision_feature_layer": [-1, 1, 0]},
    "siglip tower, llama 3": {
        "tower": SiglipVisionConfig,
        "text": {**TEXT, "num_key_value_heads": 2, "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    },
    "mistral": {"decoder": MistralConfig, "text": {**TEXT, "num_key_value_heads": 2, "sliding_window": 9}},
    "qwen 2, linear": {
        "decoder": Qwen2Config,
        "text": {**TEXT, "num_key_value_heads": 2, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    },
}


def reference(
    tower: type = CLIPVisionConfig,
    vision: dict[str, Any] = VISION,
    decoder: type = LlamaConfig,
    text: dict[str, Any] = TEXT,
    **options: Any,
) -> Any:
    config = LlavaConfig(vision_config=tower(**vision), text_config=decoder(**text), image_token_index=IMAGE, **options)
    return randomized(LlavaForConditionalGeneration(config))


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made = reference(**CASES[case])
    model = load_model(Request("llava_1_5", checkpoint=str(save(made, tmp_path))))
    assert isinstance(model.architecture, Llava)
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    pictures = raw_pixels(made.config.vision_config.image_size, 2)
    normal = torch.cat([(torch.from_numpy(pixels) / 255 - MEAN) / STD for pixels in pictures])
    with torch.no_grad():
        features = made.get_image_features(normal).pooler_output
        for pixels, expected in zip(pictures, features, strict=True):
            (image_embeds,) = runtime.call("vision_encoder", [pixels])
            assert image_embeds.shape == (1, *expected.shape)
            assert image_embeds.shape[1] == model.architecture.visual_tokens
            assert relative_l2(torch.from_numpy(image_embeds[0]), expected) <= 1e-5
        before, after = [1, 5, 60, 7], [9, 33, 4, 18]
        place = [IMAGE] * features[0].shape[0]
        for count in (0, 1, 2):
            segments = [before, *(part for pixels in pictures[:count] for part in (pixels, after))]
            ids = torch.tensor([before + (place + after) * count])
            seen = {"pixel_values": normal[:count]} if count else {}
            inputs_embeds = Dialogue(runtime).embed(segments).embeds_1SD
            runtime.reset()
            (logits,) = runtime.call("text_decoder", [inputs_embeds, np.arange(ids.shape[1])])
            assert relative_l2(torch.from_numpy(logits), made(ids, **seen).logits) <= 1e-5
            expected = made.generate(ids, **seen, do_sample=False, max_new_tokens=6, eos_token_id=None)
            *_, last = generate(runtime, segments, context=model.architecture.context, max_new_tokens=6)
            assert last.tokens == expected[0, ids.shape[1] :].tolist()


LAYOUTS: dict[str, list[tuple[str, str]]] = {
    "hub": [("vision_tower.", "vision_tower.vision_model.")],
    "in memory": [
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
    "original": [
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.", "model."),
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_public_layouts_hold_the_same(layout: str, tmp_path: Path) -> None:
    made = reference()
    made.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        old, new = next((rule for rule in LAYOUTS[layout] if name.startswith(rule[0])), ("", ""))
        renamed[new + name.removeprefix(old)] = tensor
    assert set(renamed) != set(tensors)
    (tmp_path / "b").mkdir()
    save_file(renamed, tmp_path / "b" / "model.safetensors")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    if layout == "original":
        text = config["text_config"]
        config = {**text, "mm_projector_type": "mlp2x_gelu", "vision_config": config["vision_config"]}
        config |= {"image_aspect_ratio": "pad", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    one, other = (load_model(Request("llava_1_5", checkpoint=str(tmp_path / name))) for name in "ab")
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    if layout != "original":
        assert one.architecture == other.architecture
        return
    assert isinstance(other.architecture, Llava)
    assert (other.architecture.vision, other.architecture.text) == (one.architecture.vision, one.architecture.text)
    assert other.architecture.template.render("Why?", 1).startswith("A chat between")
    padded = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    for photograph in photographs():
        expected = padded(photograph, return_tensors="pt")["pixel_values"]
        pixels = torch.from_numpy(other.architecture.image_processor(photograph))
        assert relative_l2((pixels / 255 - MEAN) / STD, expected) <= 1e-6


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LlavaProcessor, Path]:
    """A model with its processor, written by `save_pretrained`: what a fine-tune looks like on a disk."""
    tokenizer = byte_tokenizer()
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**{**TEXT, "vocab_size": 264, "max_position_embeddings": 192, "eos_token_id": 257}),
        image_token_index=image,
    )
    made = randomized(LlavaForConditionalGeneration(config), std=0.3)  # enough for answers to depend on pictures
    images = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    directory = save(made, tmp_path_factory.mktemp("made") / "assistant")
    processor.save_pretrained(directory)
    return made, processor, directory


def expected_text(made: Any, processor: LlavaProcessor, text: str, images: list[Any]) -> str:
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    tokens = made.generate(**inputs, do_sample=False, max_new_tokens=12)
    return str(processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("target", ["onnxruntime", "executorch"])
def test_bundles_answer_as_transformers_does(
    target: str, assistant: tuple[Any, LlavaProcessor, Path], tmp_path: Path
) -> None:
    made, processor, directory = assistant
    request = Request("llava_1_5", checkpoint=str(directory))
    bundle = export(ExportOptions(request, target, "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    answers = set()
    for images in ([], *([photograph] for photograph in photographs()), photographs()[:2]):
        text = f"USER: {'<image>' * len(images)}\nWhat is it? ASSISTANT:" if images else "USER: What is it? ASSISTANT:"
        question = "<image>" * len(images) + "\nWhat is it?" if images else "What is it?"
        answer, _ = session.answer(question, images, max_new_tokens=12)
        assert answer == expected_text(made, processor, text, images)
        answers.add(answer)
    assert len(answers) > 3


def test_the_prompt_is_the_processors(assistant: tuple[Any, LlavaProcessor, Path]) -> None:
    _, processor, directory = assistant
    model = load_model(Request("llava_1_5", checkpoint=str(directory)))
    assert model.architecture.template is not None
    assert model.architecture.template.render("Why?", 1) == "USER: <image>\nWhy? ASSISTANT:"
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    assert tokenizer.encode("<image>") == [processor.image_token_id]
    for photograph in photographs():
        expected = processor(text="<image>", images=photograph, return_tensors="pt")["pixel_values"]
        pixels = torch.from_numpy(model.architecture.image_processor(photograph))
        assert relative_l2((pixels / 255 - MEAN) / STD, expected) <= 1e-6


@pytest.mark.parametrize("target", ["coreml", "tensorrt"])
def test_tiny_lowers(target: str, tmp_path: Path) -> None:
    manifest = lowers(Request("llava_1_5", "tiny"), target, tmp_path / "b")
    assert set(manifest["methods"]) == {"vision_encoder", "token_embedding", "text_decoder"}


def test_published_sizes_count() -> None:
    counted(Llava)


def test_absent_keys_are_transformers_defaults() -> None:
    """config.json of llava-hf/llava-1.5-7b-hf, which says only what differs from the classes' defaults."""
    config = {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": {
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
        },
    }
    found, expected = Llava.from_config(config), LlavaConfig(**config)
    assert found.vision == CLIP_LARGE_336
    assert found.text == next(v.architecture for v in Llava.variants() if v.name == "llava-1.5-7b").text  # type: ignore[attr-defined]
    for ours, theirs in ((found.vision, expected.vision_config), (found.text, expected.text_config)):
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"):
            assert getattr(ours, key) == getattr(theirs, key)
    for decoder in (MistralConfig, Qwen2Config):
        text = Llava.from_config({"text_config": {"model_type": decoder.model_type}}).text
        for key in ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size", "max_position_embeddings"):
            assert getattr(text, key) == getattr(decoder(), key)
        assert text.sliding_window == (decoder().sliding_window or 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_config": {"model_type": "siglip_vision_modle"}}, "siglip_vision_model"),
        ({"text_config": {"model_type": "gemma"}}, "llama"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type"),
        ({"vision_feature_layer": []}, "vision_feature_layer is an empty list"),
        ({"vision_feature_layer": [-2, 26]}, "vision_feature_layer is 26"),
        ({"vision_config": {"num_channels": 4}}, "num_channels is 4"),
        ({"hidden_size": 64, "mm_projector_type": "linear"}, "mlp2x_gelu"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Llava.from_config({"model_type": "llava", **change})


def test_two_layouts_at_once_are_refused(tmp_path: Path) -> None:
    made = reference()
    made.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(120, 48)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="' are one tensor"):
        load_model(Request("llava_1_5", checkpoint=str(tmp_path)))
