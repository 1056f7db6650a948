"""InternVL 2.5 from checkpoints in both public layouts: transformers' tiles, embeddings, logits, tokens and text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor, LlamaConfig, Qwen2Config
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.internvl2_5 import ORIGINAL, InternVL
from graphs.components.vision.internvit import INTERN_VIT_6B, INTERN_VIT_300M
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.closest_grid import IMAGENET_MEAN, IMAGENET_STD, closest_grid
from graphs.trace import build_fake, count_parameters, trace
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.lowered import lowers
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, photographs, randomized, save
from tests.published import counted

MEAN, STD = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
SIDE = {"height": 32, "width": 32}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": [32, 32],
    "patch_size": [8, 8],
    "attention_bias": True,
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 512,
    "eos_token_id": 257,
}
#: the tower of the 26B to 78B sizes, small and of odd shape: no biases, RMS norms, norms of queries and keys
LARGE = {**VISION, "hidden_size": 40, "num_attention_heads": 5, "norm_type": "rms_norm", "attention_bias": False}
LARGE |= {"use_qk_norm": True, "layer_norm_eps": 1e-5}

CASES: dict[str, dict[str, Any]] = {
    "300M, qwen 2": {},
    "6B, llama": {"vision": LARGE, "decoder": LlamaConfig, "options": {"tie_word_embeddings": True}},
    "other layer, last norm, coarser": {
        "vision": {**VISION, "use_mean_pooling": False, "image_size": [48, 48], "patch_size": [6, 6]},
        "options": {"vision_feature_layer": -2, "downsample_ratio": 0.25, "projector_hidden_act": "relu"},
    },
    "no positions, last norm": {
        "vision": {**VISION, "use_mean_pooling": False, "use_absolute_position_embeddings": False},
    },
}


class PicturesOnly(InternVLProcessor):
    """The processor without the one of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        assert argument is not None or argument_name == "video_processor"


def reference(
    directory: Path,
    vision: dict[str, Any] = VISION,
    decoder: type = Qwen2Config,
    options: dict[str, Any] | None = None,
    most: int = 5,
) -> tuple[Any, InternVLProcessor]:
    """A model and its processor, both written into `directory`."""
    tokenizer = byte_tokenizer(
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=decoder(**TEXT).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        **{"tie_word_embeddings": False, **(options or {})},
    )
    made = randomized(InternVLForConditionalGeneration(config))
    side = vision["image_size"][0]
    tokens = int((side // vision["patch_size"][0] * config.downsample_ratio) ** 2)
    images = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, max_patches=most
    )
    processor = PicturesOnly(images, tokenizer, image_seq_length=tokens)
    save(made, directory)
    images.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return made, processor


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path, **CASES[case])
    model = load_model(Request("internvl2_5", checkpoint=str(tmp_path)))
    architecture = model.architecture
    assert isinstance(architecture, InternVL)
    assert architecture.image_processor.max_tiles == 5
    runtime = EagerRuntime(trace(architecture, model.weights))
    before, after, mark = [1, 5, 60, 7], [9, 33, 4], made.config.image_token_id
    counts = set()
    with torch.no_grad():
        for photograph in photographs():
            seen = architecture.image_processor.picture(photograph)
            given = processor.image_processor(photograph, crop_to_patches=True, return_tensors="pt")
            assert relative_l2((torch.from_numpy(seen.arrays[0]) / 255 - MEAN) / STD, given["pixel_values"]) <= 1e-6
            (image_embeds,) = runtime.call("vision_encoder", seen.arrays)
            features = made.get_image_features(given["pixel_values"]).pooler_output.flatten(0, 1)
            assert relative_l2(torch.from_numpy(image_embeds[0]), features) <= 1e-5
            assert seen.text.count("<IMG_CONTEXT>") == len(features) <= architecture.visual_tokens
            counts.add(len(seen.arrays[0]))
        assert len(counts) > 1
        for pictures in ([], photographs()[::3]):
            arrays = [architecture.image_processor.picture(picture).arrays for picture in pictures]
            places = [[mark] * (len(tiles) * architecture.image_processor.tokens) for (tiles,) in arrays]
            ids = torch.tensor([before + [token for place in places for token in place + after]])
            normal = [(torch.from_numpy(tiles) / 255 - MEAN) / STD for (tiles,) in arrays]
            given = {"pixel_values": torch.cat(normal)} if normal else {}
            segments = [before, *(part for one in arrays for part in (one, after))]
            expected = made.generate(ids, **given, do_sample=False, max_new_tokens=5, eos_token_id=None)
            *_, last = generate(runtime, segments, context=architecture.context, max_new_tokens=5)
            assert last.tokens == expected[0, ids.shape[1] :].tolist()
            parts = [runtime.call("vision_encoder", part)[0] for part in arrays]
            words = [runtime.call("token_embedding", [np.array([part])])[0] for part in (before, after)]
            embeds = np.concatenate([words[0], *(x for part in parts for x in (part, words[1]))], axis=1)
            runtime.reset()
            (logits,) = runtime.call("text_decoder", [embeds, np.arange(ids.shape[1])])
            assert relative_l2(torch.from_numpy(logits), made(ids, **given).logits) <= 1e-5


def original(tensors: dict[str, Tensor], heads: int, groups: int) -> dict[str, Tensor]:
    """Tensors that transformers wrote, as OpenGVLab writes them; `groups`: InternLM's queries a key, 0 for Qwen."""
    renames = [
        ("vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
        ("vision_tower.embeddings.patch_embeddings.projection", "vision_model.embeddings.patch_embedding"),
        ("vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
        ("vision_tower.encoder.layer", "vision_model.encoder.layers"),
        ("attention.projection_layer", "attn.proj"),
        ("attention.q_norm", "attn.q_norm"),
        ("attention.k_norm", "attn.k_norm"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("lambda_", "ls"),
        ("multi_modal_projector.layer_norm", "mlp1.0"),
        ("multi_modal_projector.linear_1", "mlp1.1"),
        ("multi_modal_projector.linear_2", "mlp1.3"),
    ]
    if groups:
        renames += [
            ("embed_tokens", "tok_embeddings"),
            ("lm_head", "output"),
            ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("post_attention_layernorm", "ffn_norm"),
            ("input_layernorm", "attention_norm"),
        ]
    found = {}
    for name, tensor in tensors.items():
        key = name
        for ours, theirs in renames:
            key = key.replace(ours, theirs)
        if "_proj." not in key:
            found[key] = tensor
        elif "vision_model" in key and ".q_proj." in key:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        elif groups and "self_attn.q_proj" in key:
            q, k, v = (tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv")
            width = len(q) // heads
            parts = [
                q.reshape(-1, groups, width, *q.shape[1:]),
                *(t.reshape(-1, 1, width, *t.shape[1:]) for t in (k, v)),
            ]
            fused = torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])
            found[key.replace("self_attn.q_proj", "attention.wqkv")] = fused
        elif not groups and "vision_model" not in key:
            found[key] = tensor
    return found


@pytest.mark.parametrize(("decoder", "vision"), [(Qwen2Config, VISION), (LlamaConfig, LARGE)])
def test_the_original_layout_holds_the_same(decoder: type, vision: dict[str, Any], tmp_path: Path) -> None:
    vision = {**vision, "layer_norm_eps": 1e-6}
    options = {"attention_bias": True} if decoder is LlamaConfig else {}
    text = {**TEXT, **options}
    made = randomized(
        InternVLForConditionalGeneration(
            InternVLConfig(vision_config=vision, text_config=decoder(**text).to_dict(), tie_word_embeddings=False)
        )
    )
    made.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    intern = decoder is LlamaConfig
    renamed = original(tensors, TEXT["num_attention_heads"], 2 if intern else 0)
    assert any(".qkv." in name for name in renamed)
    assert intern == any(".wqkv." in name for name in renamed)
    (tmp_path / "b").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, tmp_path / "b" / "model.safetensors")
    tower = {"qkv_bias": vision["attention_bias"], "qk_normalization": vision.get("use_qk_norm", False)}
    tower |= {"norm_type": vision.get("norm_type", "layer_norm"), "image_size": 32, "patch_size": 8}
    tower = {**{key: value for key, value in vision.items() if key not in tower}, **tower}
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    config = {
        "model_type": "internvl_chat",
        "llm_config": {**TEXT, "model_type": "internlm2" if intern else "qwen2", "bias": True, **scaling},
        "vision_config": tower,
        "force_image_size": 32,
        "max_dynamic_patch": 7,
        "ps_version": "v2",
    }
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    one, other = (load_model(Request("internvl2_5", checkpoint=str(tmp_path / name))) for name in "ab")
    assert isinstance(one.architecture, InternVL)
    assert isinstance(other.architecture, InternVL)
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert (other.architecture.original, other.architecture.fused) == (True, intern)
    assert other.architecture.vision == one.architecture.vision
    assert other.architecture.text == replace(one.architecture.text, head_dim=0)
    assert other.architecture.image_processor == replace(one.architecture.image_processor, max_tiles=7)
    assert other.architecture.template == ORIGINAL


def test_grids_are_transformers() -> None:
    sizes = np.random.default_rng(0).integers(1, 2000, (300, 2)).tolist()
    for height, width in [(1, 1), (1, 1999), (800, 600), (448, 448), (900, 900), *sizes]:
        for most in (1, 6, 12):
            expected = get_optimal_tiled_canvas((height, width), (448, 448), 1, most)
            assert closest_grid(width, height, 448, 1, most) == expected


@pytest.mark.parametrize("target", ["onnxruntime", "executorch"])
def test_bundles_answer_as_transformers_does(target: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path / "made", most=3)
    request = Request("internvl2_5", checkpoint=str(tmp_path / "made"))
    bundle = export(ExportOptions(request, target, "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    for pictures in ([], photographs()[:1], photographs()[1:3]):
        answer, _ = session.answer("Hm?", pictures, max_new_tokens=8)
        text = session.template.render("Hm?", len(pictures))
        assert (
            text == "<|im_start|>user\n" + "<IMG_CONTEXT>\n" * len(pictures) + "Hm?<|im_end|>\n<|im_start|>assistant\n"
        )
        inputs = processor(text=text, images=pictures or None, return_tensors="pt")
        tokens = made.generate(**inputs, do_sample=False, max_new_tokens=8)
        expected = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == expected.strip()


@pytest.mark.parametrize(("target", "variant"), [("coreml", "tiny"), ("tensorrt", "tiny-qk-norm")])
def test_tiny_lowers(target: str, variant: str, tmp_path: Path) -> None:
    lowers(Request("internvl2_5", variant), target, tmp_path / "b")


def test_published_sizes_count() -> None:
    for variant in counted(InternVL):
        assert isinstance(variant.architecture, InternVL)
        assert variant.architecture.image_processor.tokens == 256
        assert variant.architecture.visual_tokens == 13 * 256


def test_layers_that_are_never_built_are_counted() -> None:
    for tower in (INTERN_VIT_300M, INTERN_VIT_6B):
        text = InternVL.variants()[0].architecture.text  # type: ignore[attr-defined]
        whole, partial = (InternVL(tower, text, select_layer=layer) for layer in (-1, 7))
        assert count_parameters(whole) == count_parameters(partial)
        built = build_fake(partial).get_submodule("vision_encoder.tower.layers")
        assert len(built) == 7
        assert sum(p.numel() for p in built[0].parameters()) == tower.layer_parameters


def test_absent_keys_are_transformers_defaults() -> None:
    found, expected = InternVL.from_config({}), InternVLConfig()
    assert found.vision == replace(INTERN_VIT_300M, attention_bias=False)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps"):
        assert getattr(found.vision, key) == getattr(expected.vision_config, key)
    assert found.text.num_key_value_heads == expected.text_config.num_key_value_heads
    assert found.text.tie_word_embeddings == expected.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_config": {"image_size": [448, 224]}}, "takes squares"),
        ({"vision_config": {"norm_type": "rmsnorm"}}, "rms_norm"),
        ({"vision_config": {"hidden_size": 1000}}, "num_attention_heads 16"),
        ({"vision_config": {"patch_size": 449}}, "patch_size 449"),
        ({"vision_config": {"image_size": 434}}, "31 patches a side"),
        ({"vision_feature_select_strategy": "full"}, "default"),
        ({"downsample_ratio": 0.4}, "downsample_ratio is 0.4"),
        ({"text_config": {"model_type": "qwen"}}, "qwen2"),
        ({"llm_config": {"model_type": "internlm3"}}, "internlm2"),
        ({"llm_config": {"model_type": "qwen2"}, "ps_version": "v1"}, "ps_version"),
        ({"llm_config": {"model_type": "qwen2"}, "force_image_size": 448}, "force_image_size 448"),
        ({"llm_config": {"model_type": "qwen2"}, "pad2square": True}, "pad2square"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        InternVL.from_config(change)


def test_tiles_that_the_tower_does_not_take_are_refused() -> None:
    with pytest.raises(UserError, match="size is 384 x 448; this tower takes tiles of 448 x 448"):
        InternVL.from_config({}, {"size": {"height": 384, "width": 448}})
    with pytest.raises(UserError, match="min_patches 4 is above max_patches 3"):
        InternVL.from_config({}, {"min_patches": 4, "max_patches": 3})


def test_a_square_picture_of_one_tile_has_no_thumbnail() -> None:
    processor = InternVL.from_config({}).image_processor
    assert len(processor(Image.new("RGB", (300, 300)))) == 1
    assert len(processor(Image.new("RGB", (300, 150)))) == 3
