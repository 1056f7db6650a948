"""Janus and Janus-Pro from checkpoints that transformers' class wrote: what they read, say and draw.

Both rows are one class, as both are there: they differ in the names of the speakers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.janus import BEGIN, END, MARK, Janus
from graphs.architectures.janus_pro import JanusPro
from graphs.errors import UserError
from graphs.model import Request, load_model, parameter_shapes
from graphs.preprocess.prompt import read
from graphs.preprocess.tokenizer import load_tokenizer
from graphs.trace import count_parameters, trace
from graphs.weights import Checkpoint, Weights
from runtimes.draw import blanked, draw, picture
from runtimes.eager import EagerRuntime
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.answers import all_logits, greedy_tokens
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, odd_pictures, randomized, save
from tests.published import counted

HALF = [0.5, 0.5, 0.5]
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 48,
    "num_image_tokens": 16,
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
CODES: dict[str, Any] = {
    "embed_dim": 8,
    "num_embeddings": 40,
    "latent_channels": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "projection_dim": 48,
    "image_token_embed_dim": 48,
}
CASES: dict[str, dict[str, Any]] = {
    "janus": {},
    "janus_pro": {
        "vision": {**VISION, "image_size": 45, "patch_size": 9, "mlp_ratio": 2.5, "depth": 3, "num_image_tokens": 25},
        "codes": {
            **CODES,
            "embed_dim": 6,
            "channel_multiplier": [2, 1, 3],
            "num_res_blocks": 2,
            "num_hidden_layers": 1,
        },
        "tied": False,
    },
}


def reference(
    directory: Path, vision: dict[str, Any] = VISION, codes: dict[str, Any] = CODES, tied: bool = True
) -> tuple[Any, JanusProcessor]:
    """A model and its processor, both written into `directory`."""
    special = {"image_token": MARK, "boi_token": BEGIN, "eoi_token": END}
    words: Any = byte_tokenizer(extra_special_tokens=special)
    words.add_tokens([*special.values()], special_tokens=True)
    config = JanusConfig(
        vision_config=JanusVisionConfig(**vision),
        text_config=LlamaConfig(**TEXT),
        vq_config=JanusVQVAEConfig(**codes),
        image_token_id=words.convert_tokens_to_ids(MARK),
        tie_word_embeddings=tied,
    )
    made = randomized(JanusForConditionalGeneration(config))
    made.generation_config = GenerationConfig(
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        generation_kwargs={"boi_token_id": words.convert_tokens_to_ids(BEGIN)},
    )
    side = vision["image_size"]
    images = JanusImageProcessorPil(size={"height": side, "width": side}, image_mean=HALF, image_std=HALF)
    processor = JanusProcessor(images, words, num_image_tokens=(side // vision["patch_size"]) ** 2)
    save(made, directory)
    processor.save_pretrained(directory)
    return made, processor


def pictures() -> list[Image.Image]:
    """Photographs, and shapes that are hard to fit."""
    return odd_pictures((90, 7), (13, 400))


@pytest.mark.parametrize("case", CASES)
def test_reads_as_transformers_does(case: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path, **CASES[case])
    model = load_model(Request(case, checkpoint=str(tmp_path)))
    architecture = model.architecture
    assert isinstance(architecture, Janus)
    prepare, words = architecture.image_processor, load_tokenizer(tmp_path)
    assert words is not None
    runtime = EagerRuntime(trace(architecture, model.weights))
    with torch.no_grad():
        for given in pictures():
            inputs = processor.image_processor(given, return_tensors="pt")
            pixels = prepare(given)
            assert relative_l2(torch.from_numpy(pixels) / 255 * 2 - 1, inputs["pixel_values"]) <= 1e-6
            (image_embeds,) = runtime.call("vision_encoder", [pixels])
            expected = made.model.get_image_features(**inputs).pooler_output
            assert relative_l2(torch.from_numpy(image_embeds), expected) <= 1e-5
        for count in (0, 1, 2):
            seen = pictures()[:count]
            text = architecture.template.render("Hm?", count)
            inputs = dict(processor(text=text, images=seen or None, return_tensors="pt"))
            pieces = read(architecture.template, "Hm?", [prepare.picture(p) for p in seen], words)
            assert relative_l2(all_logits(runtime, pieces), made(**inputs).logits) <= 1e-5
            expected = made.generate(**inputs, do_sample=False, max_new_tokens=5, eos_token_id=None)
            tokens = greedy_tokens(runtime, pieces, architecture.context, 5)
            assert tokens == expected[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_draws_as_transformers_does(case: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path, **CASES[case])
    model = load_model(Request(case, checkpoint=str(tmp_path)))
    assert isinstance(model.architecture, Janus)
    program = trace(model.architecture, model.weights)
    guided, free = EagerRuntime(program), EagerRuntime(program)
    codes = model.architecture.drawing.codes
    begin = processor.tokenizer.convert_tokens_to_ids(BEGIN)
    drawings = set()
    for text in ("A cat.", "Two dogs, at night"):
        inputs = processor(text=f"<s>{text}", generation_mode="image", return_tensors="pt")
        options = {"generation_mode": "image", "do_sample": False, "guidance_scale": 3.0, "max_new_tokens": codes}
        expected = made.generate(**inputs, **options)[0]
        prompt = inputs["input_ids"][0].tolist()
        assert prompt[0] == 256
        assert prompt[-1] == begin
        drawn = draw(guided, free, prompt, blanked(prompt, (256, begin), 258), codes=codes, guidance=3.0)
        assert drawn == expected.tolist()
        drawings.add(tuple(drawn))
        with torch.no_grad():
            decoded = made.decode_image_tokens(expected[None]).permute(0, 3, 1, 2)
            pixels = torch.from_numpy(guided.call("image_decoder", [expected[None].numpy()])[0])
            shown = ((decoded * 0.5 + 0.5) * 255).clip(0, 255)
            assert relative_l2(pixels, shown) <= 1e-5
            (theirs,) = processor.postprocess([*decoded.numpy()], return_tensors="PIL.Image.Image")["pixel_values"]
        image = picture(guided, drawn)
        assert image.size == (model.architecture.drawing.image_size,) * 2
        difference = np.abs(np.asarray(image, np.int64) - np.asarray(theirs, np.int64))
        assert difference.max() <= 1
        assert np.asarray(image).std() > 20
    assert len(drawings) == 2


TIMM = [
    ("model.vision_model.encoder.layers.", "vision_model.vision_tower.blocks."),
    ("model.vision_model.embeddings.patch_embedding.", "vision_model.vision_tower.patch_embed.proj."),
    ("model.vision_model.embeddings.position_embedding.weight", "vision_model.vision_tower.pos_embed"),
    ("model.vision_model.post_layernorm.", "vision_model.vision_tower.norm."),
    ("model.aligner.fc1.", "aligner.layers.0."),
    ("model.aligner.hidden_layers.0.", "aligner.layers.2."),
    ("model.vqmodel.", "gen_vision_model."),
    ("model.generation_embeddings.", "gen_embed."),
    ("model.generation_aligner.fc1.", "gen_aligner.layers.0."),
    ("model.generation_aligner.hidden_layers.0.", "gen_aligner.layers.2."),
    ("model.generation_head.proj_out.", "gen_head.output_mlp_projector."),
    ("model.generation_head.", "gen_head."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
]
BLOCKS = [
    ("self_attn.projection_layer.", "attn.proj."),
    ("layer_norm1.", "norm1."),
    ("layer_norm2.", "norm2."),
]
LEVELS = [
    ("coder.up.", "coder.conv_blocks."),
    ("coder.down.", "coder.conv_blocks."),
    (".block.", ".res."),
    ("mid.block_1.", "mid.0."),
    ("mid.attn_1.", "mid.1."),
    ("mid.block_2.", "mid.2."),
]


def as_original(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint of transformers' as the authors' repository keeps it."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        old, new = next(rule for rule in TIMM if name.startswith(rule[0]))
        key = new + name.removeprefix(old)
        for old, new in BLOCKS if "vision_tower" in key else LEVELS if key.startswith("gen_vision") else []:
            key = key.replace(old, new)
        found[key] = tensor.unsqueeze(0) if key.endswith("pos_embed") else tensor
    for key in [key for key in found if ".self_attn.q_proj." in key and "vision_tower" in key]:
        parts = [found.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[key.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
    return found


def test_the_authors_layout_holds_the_same(tmp_path: Path) -> None:
    made, _ = reference(tmp_path / "a", tied=False)
    made.save_pretrained(tmp_path / "whole")
    tensors = as_original(load_file(tmp_path / "whole" / "model.safetensors"))
    tensors["gen_vision_model.quantize.codebook_used"] = torch.zeros(40)
    tensors["vision_model.vision_tower.attn_pool.latent"] = torch.zeros(1, 1, 32)
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    (tmp_path / "b" / "config.json").write_text("{}")
    hub = load_model(Request("janus", checkpoint=str(tmp_path / "a")))
    assert isinstance(hub.architecture, Janus)
    original = replace(hub.architecture, original=True)
    checkpoint = Checkpoint.open(tmp_path / "b")
    checkpoint.rename(original.aliases)
    shapes = parameter_shapes(original)
    found = Weights(checkpoint, {name: original.source(name) for name in shapes})
    found.check(shapes, original.unused)
    assert set(found) == set(hub.weights)
    for name, expected in hub.weights.items():
        assert torch.equal(found[name], expected)


def test_the_authors_configuration_is_the_published_size() -> None:
    config = {
        "model_type": "multi_modality",
        "language_config": {
            "model_type": "llama",
            "vocab_size": 102400,
            "max_position_embeddings": 16384,
            "num_hidden_layers": 30,
        },
        "vision_config": {"params": {"model_name": "siglip_large_patch16_384", "image_size": 384}},
        "aligner_config": {"params": {"depth": 2, "n_embed": 4096, "projector_type": "mlp_gelu"}},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
        "gen_aligner_config": {"params": {"depth": 2, "n_embed": 4096, "projector_type": "mlp_gelu"}},
        "gen_head_config": {"params": {"image_token_embed": 4096, "image_token_size": 16384, "n_embed": 4096}},
    }
    found = JanusPro.from_config(config, {"image_size": 384, "min_size": 14, "image_mean": HALF, "image_std": HALF})
    published = next(v.architecture for v in JanusPro.variants() if v.name == "janus-pro-7b")
    assert replace(found, processor=None) == published
    assert found.image_processor == published.image_processor
    assert found.drawing.image_size == 384
    assert JanusPro.template.fget(found).render("Hm?", 1).endswith(f"<|User|>: {MARK}\nHm?\n\n<|Assistant|>:")  # type: ignore[attr-defined]


def test_bundles_read_and_draw_as_transformers_does(tmp_path: Path) -> None:
    made, processor = reference(tmp_path / "made")
    request = Request("janus", checkpoint=str(tmp_path / "made"), max_context=320)
    bundle = Bundle.open(export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent))
    session, other = Session.open(bundle), Session.open(bundle)
    for seen in ([], pictures()[:1], pictures()[1:3]):
        answer, _ = session.answer("Hm?", seen, max_new_tokens=8)
        inputs = processor(text=session.template.render("Hm?", len(seen)), images=seen or None, return_tensors="pt")
        tokens = made.generate(**inputs, do_sample=False, max_new_tokens=8)
        expected = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == expected.strip()
    inputs = processor(text="<s>A cat.", generation_mode="image", return_tensors="pt")
    options = {"generation_mode": "image", "do_sample": False, "guidance_scale": 3.0, "max_new_tokens": 16}
    expected = made.generate(**inputs, **options)[0].tolist()
    prompt = inputs["input_ids"][0].tolist()
    blank = blanked(prompt, (prompt[0], prompt[-1]), 258)
    assert draw(session.runtime, other.runtime, prompt, blank, codes=16, guidance=3.0) == expected


def test_published_sizes_count() -> None:
    counted(Janus, JanusPro)


def test_the_checkpoint_counts_whole(tmp_path: Path) -> None:
    made, _ = reference(tmp_path, **CASES["janus_pro"])
    architecture = load_model(Request("janus_pro", checkpoint=str(tmp_path))).architecture
    assert count_parameters(architecture) == sum(parameter.numel() for parameter in made.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "janus_vision_model"),
        ({"vision_config": {"use_qk_norm": True}}, "use_qk_norm is true"),
        ({"vision_config": {"projection_dim": 96}}, "projection_dim is 96"),
        ({"text_config": {"model_type": "gemma", "hidden_size": 2048}}, "llama"),
        ({"text_config": {"hidden_size": 2048}, "vq_config": {"base_channels": 48}}, "base_channels 48"),
        (
            {"text_config": {"hidden_size": 2048}, "vq_config": {"image_token_embed_dim": 8}},
            "image_token_embed_dim is 8",
        ),
        (
            {"language_config": {"hidden_size": 64}, "vision_config": {"params": {"model_name": "siglip"}}},
            "siglip_large",
        ),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Janus.from_config({"model_type": "janus", **change})
