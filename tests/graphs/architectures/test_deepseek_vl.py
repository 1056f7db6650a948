"""DeepSeek-VL from checkpoints that transformers' two classes wrote: the same squares, embeddings and answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DeepseekVLHybridProcessor,
    DeepseekVLProcessor,
    LlamaConfig,
    Qwen2Config,
    SamVisionConfig,
    SiglipVisionConfig,
)
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.deepseek_vl import DeepseekVL
from graphs.errors import UserError
from graphs.model import Request, load_model, parameter_shapes
from graphs.preprocess.prompt import read
from graphs.preprocess.tokenizer import load_tokenizer
from graphs.spec import Architecture
from graphs.trace import trace
from graphs.weights import Checkpoint, Weights
from runtimes.eager import EagerRuntime
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.answers import all_logits, greedy_tokens
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, odd_pictures, photographs, randomized, save
from tests.published import counted

MARK = "<image_placeholder>"
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "gelu",
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
HIGH: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 72,
    "patch_size": 8,
    "output_channels": 8,
    "window_size": 4,
    "global_attn_indexes": [1],
}
#: `high`: of the second tower, None where there is one only; `tied`: whether the head is the embedding
CASES: dict[str, dict[str, Any]] = {
    "siglip": {"high": None},
    "siglip, odd": {
        "high": None,
        "vision": {**VISION, "hidden_size": 36, "num_attention_heads": 3, "image_size": 35, "patch_size": 7},
        "tied": False,
        "decoder": Qwen2Config,
    },
    "hybrid": {},
    "hybrid, odd": {
        "vision": {**VISION, "image_size": 40},
        "high": {**HIGH, "image_size": 80, "window_size": 5, "global_attn_indexes": [2, 0], "mlp_ratio": 2.5},
        "tied": False,
    },
}


def tokenizer() -> Any:
    """One that knows the placeholder, and names it as the processors ask."""
    made = byte_tokenizer(extra_special_tokens={"image_token": MARK})
    made.add_tokens([MARK], special_tokens=True)
    return made


def reference(
    directory: Path,
    vision: dict[str, Any] = VISION,
    high: dict[str, Any] | None = HIGH,
    decoder: type = LlamaConfig,
    tied: bool = True,
) -> tuple[Any, Any]:
    """A model and its processor, both written into `directory`."""
    words = tokenizer()
    side = vision["image_size"]
    options: dict[str, Any] = {
        "vision_config": SiglipVisionConfig(**vision),
        "text_config": decoder(**TEXT),
        "image_token_id": words.convert_tokens_to_ids(MARK),
        "tie_word_embeddings": tied,
    }
    square = {"height": side, "width": side}
    half: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": Image.Resampling.BILINEAR}
    tokens = (side // vision["patch_size"]) ** 2
    if high is None:
        made = randomized(DeepseekVLForConditionalGeneration(DeepseekVLConfig(**options)))
        processor: Any = DeepseekVLProcessor(DeepseekVLImageProcessorPil(size=square), words, num_image_tokens=tokens)
    else:
        config = DeepseekVLHybridConfig(**options, high_res_vision_config=SamVisionConfig(**high))
        made = randomized(DeepseekVLHybridForConditionalGeneration(config))
        large = {"height": high["image_size"], "width": high["image_size"]}
        images = DeepseekVLHybridImageProcessorPil(size=square, high_res_size=large, **half)
        processor = DeepseekVLHybridProcessor(images, words, num_image_tokens=tokens)
    save(made, directory)
    processor.save_pretrained(directory)
    return made, processor


def pictures() -> list[Image.Image]:
    """Photographs, and shapes that are hard to fit."""
    return odd_pictures((90, 7), (13, 400), (9, 9))


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path, **CASES[case])
    model = load_model(Request("deepseek_vl", checkpoint=str(tmp_path)))
    assert isinstance(model.architecture, DeepseekVL)
    prepare: Any = model.architecture.image_processor
    words = load_tokenizer(tmp_path)
    assert words is not None
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    with torch.no_grad():
        for picture in pictures():
            inputs = processor.image_processor(picture, return_tensors="pt")
            arrays = prepare.picture(picture).arrays
            statistics = [(prepare.image_mean, prepare.image_std)]
            if model.architecture.high:
                statistics.append((prepare.large_mean, prepare.large_std))
            for array, expected, (mean, std) in zip(arrays, inputs.values(), statistics, strict=True):
                less, by = (torch.tensor(numbers).reshape(3, 1, 1) for numbers in (mean, std))
                assert relative_l2((torch.from_numpy(array) / 255 - less) / by, expected) <= 1e-6
            (image_embeds,) = runtime.call("vision_encoder", arrays)
            expected = made.model.get_image_features(**inputs).pooler_output
            assert relative_l2(torch.from_numpy(image_embeds), expected) <= 1e-5
        for count in (0, 1, 2):
            seen = pictures()[:count]
            text = model.architecture.template.render("Hm?", count)
            inputs = dict(processor(text=text, images=seen or None, return_tensors="pt"))
            pieces = read(model.architecture.template, "Hm?", [prepare.picture(p) for p in seen], words)
            assert relative_l2(all_logits(runtime, pieces), made(**inputs).logits) <= 1e-5
            expected = made.generate(**inputs, do_sample=False, max_new_tokens=5, eos_token_id=None)
            tokens = greedy_tokens(runtime, pieces, model.architecture.context, 5)
            assert tokens == expected[0, inputs["input_ids"].shape[1] :].tolist()


SIGLIP = [
    ("vision_model.encoder.layers.", "blocks."),
    ("vision_model.embeddings.patch_embedding.", "patch_embed.proj."),
    ("vision_model.embeddings.position_embedding.weight", "pos_embed"),
    ("vision_model.post_layernorm.", "norm."),
    ("vision_model.head.", "attn_pool."),
]
SAM = [
    ("high_res_vision_model.vision_encoder.patch_embed.projection.", "patch_embed.proj."),
    ("high_res_vision_model.vision_encoder.layers.", "blocks."),
    *((f"high_res_vision_model.vision_encoder.neck.{p}.", f"neck.{n}.") for p, n in (("conv1", 0), ("conv2", 2))),
    *((f"high_res_vision_model.vision_encoder.neck.layer_norm{n + 1}.", f"neck.{2 * n + 1}.") for n in (0, 1)),
    *((f"high_res_vision_neck.{p}.", f"neck_hd.{n}.") for p, n in (("conv1", 0), ("conv2", 2))),
    *((f"high_res_vision_neck.layer_norm{n + 1}.", f"neck_hd.{2 * n + 1}.") for n in (0, 1)),
    *((f"high_res_vision_proj.conv{n + 1}.", f"downsamples.{n}.") for n in (0, 1)),
    ("high_res_vision_alpha", "hd_alpha_downsamples"),
    ("high_res_vision_model.vision_encoder.pos_embed", "pos_embed"),
]
INNER = [("self_attn.out_proj.", "attn.proj."), ("layer_norm1.", "norm1."), ("layer_norm2.", "norm2.")]
REST = [
    ("language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("aligner.linear1.", "aligner.layers.0."),
    ("aligner.linear2.", "aligner.layers.2."),
    ("aligner.proj.", "aligner.layers.1."),
    ("aligner.vision_proj.", "aligner.low_up_proj."),
    ("aligner.high_res_vision_proj.", "aligner.high_up_proj."),
]


def as_original(tensors: dict[str, torch.Tensor], hybrid: bool) -> dict[str, torch.Tensor]:
    """A checkpoint of transformers' as the authors' repository keeps it."""
    low = "vision_model.vision_tower_low.vision_tower." if hybrid else "vision_model.vision_tower."
    high = "vision_model.vision_tower_high.vision_tower."
    rules = [*((old, low + new) for old, new in SIGLIP), *((old, high + new) for old, new in SAM), *REST]
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        key = name.removeprefix("model.")
        old, new = next((rule for rule in rules if key.startswith(rule[0])), ("", ""))
        key = new + key.removeprefix(old)
        if ".blocks." in key:
            for old, new in INNER:
                key = key.replace(old, new)
        found[key] = tensor.unsqueeze(0) if key == f"{low}pos_embed" else tensor
    for key in [key for key in found if ".self_attn.q_proj." in key and low in key]:
        parts = [found.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[key.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
    return found


def weights(architecture: Architecture, directory: Path) -> Weights:
    """What `architecture` reads from a checkpoint, its names and shapes checked."""
    checkpoint = Checkpoint.open(directory)
    checkpoint.rename(architecture.aliases)
    shapes = parameter_shapes(architecture)
    found = Weights(checkpoint, {name: architecture.source(name) for name in shapes})
    found.check(shapes, architecture.unused)
    return found


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_authors_layout_holds_the_same(hybrid: bool, tmp_path: Path) -> None:
    made, _ = reference(tmp_path / "a", high=HIGH if hybrid else None, tied=False)
    made.save_pretrained(tmp_path / "whole")
    tensors = as_original(load_file(tmp_path / "whole" / "model.safetensors"), hybrid)
    if hybrid:
        tensors["vision_model.high_layer_norm.weight"] = torch.ones(32)
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    (tmp_path / "b" / "config.json").write_text("{}")
    hub = load_model(Request("deepseek_vl", checkpoint=str(tmp_path / "a")))
    assert isinstance(hub.architecture, DeepseekVL)
    found = weights(replace(hub.architecture, original=True), tmp_path / "b")
    assert set(found) == set(hub.weights)
    for name, expected in hub.weights.items():
        assert torch.equal(found[name], expected)


def test_the_authors_configurations_are_the_published_sizes() -> None:
    siglip = {"model_name": "siglip_large_patch16_384", "image_size": 384, "select_feature": "same"}
    sam = {"model_name": "sam_b_downsample", "image_size": 1024, "select_feature": "same"}
    published = {variant.name: variant.architecture for variant in DeepseekVL.variants()}
    for name, sizes, tower, params, projector, side in (
        ("deepseek-vl-1.3b", (2048, 5632, 24, 16), "CLIPVisionTower", siglip, "mlp_gelu", 384),
        (
            "deepseek-vl-7b",
            (4096, 11008, 30, 32),
            "HybridVisionTower",
            {"high_res_cfg": sam, "low_res_cfg": siglip},
            "low_high_hybrid_split_mlp_gelu",
            1024,
        ),
    ):
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        language = {**dict(zip(keys, sizes, strict=True)), "vocab_size": 102400, "max_position_embeddings": 16384}
        config = {
            "model_type": "multi_modality",
            "language_config": {"model_type": "llama", **language},
            "vision_config": {"cls": tower, "params": params},
            "aligner_config": {"params": {"depth": 2, "projector_type": projector}},
        }
        found = DeepseekVL.from_config(config, {"image_size": side, "min_size": 14})
        assert replace(found, processor=None) == published[name]
        assert found.image_processor.picture(photographs()[0]).arrays[-1].shape[-1] == side


@pytest.mark.parametrize("case", ["siglip", "hybrid"])
def test_bundles_answer_as_transformers_does(case: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path / "made", **CASES[case])
    request = Request("deepseek_vl", checkpoint=str(tmp_path / "made"), max_context=320)
    bundle = export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    for seen in ([], pictures()[:1], pictures()[3:5]):
        answer, _ = session.answer("Hm?", seen, max_new_tokens=8)
        inputs = processor(text=session.template.render("Hm?", len(seen)), images=seen or None, return_tensors="pt")
        tokens = made.generate(**inputs, do_sample=False, max_new_tokens=8)
        expected = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == expected.strip()


def test_published_sizes_count() -> None:
    counted(DeepseekVL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_config": {"model_type": "clip_vision_model"}}, "siglip_vision_model"),
        ({"text_config": {"model_type": "gemma"}}, "llama"),
        ({"model_type": "deepseek_vl_hybird"}, "deepseek_vl_hybrid"),
        ({"high_res_vision_config": {"global_attn_indexes": [12]}}, "global_attn_indexes"),
        ({"high_res_vision_config": {"use_rel_pos": False}}, "use_rel_pos is false"),
        ({"language_config": {"hidden_size": 64}, "vision_config": {"cls": "ResNet"}}, "CLIPVisionTower"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DeepseekVL.from_config({"model_type": "deepseek_vl_hybrid", **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": {"height": 384, "width": 256}}, "takes pictures of 224 x 224"),
        ({"do_pad": False}, "do_pad is false"),
        ({"high_res_size": {"height": 512, "width": 512}}, "takes pictures of 1024 x 1024"),
    ],
)
def test_other_pictures_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DeepseekVL.from_config({"model_type": "deepseek_vl_hybrid"}, {"size": {"height": 224, "width": 224}, **change})
