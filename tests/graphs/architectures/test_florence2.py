"""Florence-2 from checkpoints that transformers' class wrote: the same embeddings, logits, tokens and text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.florence2 import IMAGENET_MEAN, IMAGENET_STD, Florence2
from graphs.dialogue import Dialogue, Segment
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.prompt import read
from graphs.preprocess.tokenizer import load_tokenizer
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, photographs, randomized, raw_pixels, save
from tests.published import counted

IMAGE = 259
MEAN = torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1)
STD = torch.tensor(IMAGENET_STD).reshape(3, 1, 1)
VISION: dict[str, Any] = {
    "embed_dim": [16, 24, 32, 40],
    "depths": [1, 1, 2, 1],
    "num_heads": [2, 3, 4, 5],
    "num_groups": [2, 3, 4, 5],
    "window_size": 4,
    "projection_dim": 48,
    "max_position_embeddings": 8,
}
TEXT: dict[str, Any] = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "vocab_size": 264,
    "max_position_embeddings": 160,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "decoder_start_token_id": 257,
    "forced_eos_token_id": None,
}
CASES: dict[str, dict[str, Any]] = {
    "published proportions": {"side": 128},
    "odd, maps that are no whole number of windows": {
        "side": 60,
        "vision": {
            **VISION,
            "embed_dim": [20, 30, 42],
            "depths": [1, 2, 1],
            "num_heads": [2, 5, 7],
            "num_groups": [4, 3, 6],
            "patch_size": [5, 3, 2],
            "patch_stride": [3, 2, 2],
            "patch_padding": [1, 1, 0],
            "patch_prenorm": [True, False, True],
            "mlp_ratio": 2.5,
            "qkv_bias": False,
        },
        "text": {
            **TEXT,
            "scale_embedding": True,
            "activation_function": "relu",
            "encoder_layers": 1,
            "decoder_layers": 3,
            "decoder_attention_heads": 6,
            "decoder_ffn_dim": 72,
        },
    },
}


def reference(
    directory: Path, side: int = 70, vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT
) -> tuple[Any, Florence2Processor]:
    """A model and its processor, both written into `directory`."""
    tokenizer = byte_tokenizer()
    tokenizer.image_token, tokenizer.image_token_id = "<image>", IMAGE
    specials = [("<s>", 256), ("</s>", 257)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=specials
    )
    config = Florence2Config(
        vision_config=Florence2VisionConfig(**vision), text_config=BartConfig(**text), image_token_id=IMAGE
    )
    made = randomized(Florence2ForConditionalGeneration(config))
    with torch.no_grad():  # so that answers depend on pictures
        for module in made.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight += 1
    images = CLIPImageProcessorPil(
        size={"height": side, "width": side}, do_center_crop=False, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )
    with torch.no_grad():
        images.image_seq_length = made.get_image_features(torch.zeros(1, 3, side, side)).pooler_output.shape[1]
    processor = Florence2Processor(images, tokenizer)
    save(made, directory)
    processor.save_pretrained(directory)
    return made, processor


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made, _ = reference(tmp_path, **CASES[case])
    model = load_model(Request("florence2", checkpoint=str(tmp_path)))
    assert isinstance(model.architecture, Florence2)
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    pictures = raw_pixels(model.architecture.image_size, 2)
    normal = torch.cat([(torch.from_numpy(pixels) / 255 - MEAN) / STD for pixels in pictures])
    question, answer = [256, 9, 33, 4, 18, 257], (257, 256, 40, 7)
    with torch.no_grad():
        features = made.get_image_features(normal).pooler_output
        for pixels, expected in zip(pictures, features, strict=True):
            (image_embeds,) = runtime.call("vision_encoder", [pixels])
            assert image_embeds.shape == (1, model.architecture.visual_tokens, 48)
            assert relative_l2(torch.from_numpy(image_embeds[0]), expected) <= 1e-5
        place = [IMAGE] * model.architecture.visual_tokens
        for count in (0, 1, 2):
            segments: list[Segment] = [*pictures[:count], question]
            ids = torch.tensor([place * count + question])
            seen = {"pixel_values": normal[:count]} if count else {}
            dialogue = Dialogue(runtime, answer)
            runtime.reset()
            logits = torch.from_numpy(dialogue.prefill(dialogue.embed(segments)))
            expected = made(ids, **seen, decoder_input_ids=torch.tensor([answer])).logits[0, -1]
            assert relative_l2(logits, expected) <= 1e-5
            expected = made.generate(ids, **seen, do_sample=False, num_beams=1, max_new_tokens=6, eos_token_id=None)
            *_, last = generate(
                runtime,
                segments,
                context=model.architecture.context,
                max_new_tokens=6,
                start=model.architecture.template.start,
            )
            assert last.tokens == expected[0, 1:].tolist()


#: names of tensors as transformers writes them -> as the authors' checkpoints have them
ORIGINAL: list[tuple[str, str]] = [
    (r"model\.language_model\.shared", "language_model.model.shared"),
    (r"model\.language_model\.", "language_model.model."),
    (r"model\.multi_modal_projector\.image_projection\.weight", "image_projection"),
    (r"model\.multi_modal_projector\.image_position_embed", "image_pos_embed"),
    (r"model\.multi_modal_projector\.", ""),
    (r"model\.vision_tower\.(convs\.\d)\.conv\.", r"vision_tower.\1.proj."),
    (r"model\.(.*_block)\.(conv\d)\.", r"\1.\2.fn.dw."),
    (r"model\.(.*spatial_block)\.norm1\.", r"\1.window_attn.norm."),
    (r"model\.(.*channel_block)\.norm1\.", r"\1.channel_attn.norm."),
    (r"model\.(.*_block)\.norm2\.", r"\1.ffn.norm."),
    (r"model\.(.*(window|channel)_attn)\.", r"\1.fn."),
    (r"model\.(.*_block\.ffn)\.", r"\1.fn.net."),
    (r"model\.", ""),
]


def test_the_authors_layout_holds_the_same(tmp_path: Path) -> None:
    made, _ = reference(tmp_path / "a")
    made.save_pretrained(tmp_path / "a")
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tmp_path / "a" / "model.safetensors").items():
        rule = next((old, new) for old, new in ORIGINAL if re.match(old, name))
        renamed[re.sub(rule[0], rule[1], name, count=1)] = tensor
    renamed["image_projection"] = renamed["image_projection"].T.contiguous()
    vocabulary = renamed["language_model.model.shared.weight"]
    for name in ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"):
        renamed[f"language_model.{name}.weight"] = vocabulary.clone()
    bias = torch.randn(1, TEXT["vocab_size"])
    renamed["language_model.final_logits_bias"] = bias
    assert "vision_tower.blocks.2.1.channel_block.channel_attn.fn.qkv.weight" in renamed
    assert "vision_tower.blocks.0.0.spatial_block.ffn.fn.net.fc1.bias" in renamed
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    vision = config["vision_config"]
    config["vision_config"] = {
        **{key: value for key, value in vision.items() if key not in ("embed_dim", "max_position_embeddings")},
        "model_type": "davit",
        "dim_embed": vision["embed_dim"],
        "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": vision["max_position_embeddings"]},
        "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 100},
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
    }
    config["text_config"] |= {"model_type": "florence2_language", "forced_bos_token_id": 256}
    (tmp_path / "b").mkdir()
    save_file(renamed, tmp_path / "b" / "model.safetensors")
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    processor = json.loads((tmp_path / "a" / "processor_config.json").read_text())["image_processor"]
    (tmp_path / "b" / "preprocessor_config.json").write_text(json.dumps(processor))
    for shard in (tmp_path / "a").glob("model-*"):
        shard.unlink()
    (tmp_path / "a" / "model.safetensors.index.json").unlink(missing_ok=True)
    one, other = (load_model(Request("florence2", checkpoint=str(tmp_path / name))) for name in "ab")
    assert isinstance(one.architecture, Florence2)
    assert isinstance(other.architecture, Florence2)
    assert (one.architecture.vision, one.architecture.text) == (other.architecture.vision, other.architecture.text)
    assert (one.architecture.start, other.architecture.start) == ((257,), (257, 256))
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert set(other.weights) - set(one.weights) == {"text_decoder.lm_head.bias"}
    dialogue = Dialogue(EagerRuntime(trace(other.architecture, other.weights)), other.architecture.start)
    logits = torch.from_numpy(dialogue.prefill(dialogue.embed([[256, 5, 257]])))
    with torch.no_grad():
        expected = made(torch.tensor([[256, 5, 257]]), decoder_input_ids=torch.tensor([[257, 256]])).logits[0, -1]
    assert relative_l2(logits, expected + bias[0]) <= 1e-5


def test_prompts_and_pixels_are_the_processors(tmp_path: Path) -> None:
    _, processor = reference(tmp_path)
    architecture = load_model(Request("florence2", checkpoint=str(tmp_path))).architecture
    assert isinstance(architecture, Florence2)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    prompts = ["<OD>", "<CAPTION_TO_PHRASE_GROUNDING> A roof. ", "<REGION_TO_OCR><loc_1>", "Why?"]
    for photograph, prompt in zip(photographs(), prompts, strict=True):
        expected = processor(text=prompt, images=photograph, return_tensors="pt")
        picture = architecture.image_processor.picture(photograph)
        view, words = read(architecture.template, prompt, [picture], tokenizer)
        assert not isinstance(view, list)
        assert [IMAGE] * architecture.visual_tokens + words == expected["input_ids"][0].tolist()
        pixels = torch.from_numpy(picture.arrays[0])
        assert relative_l2((pixels / 255 - MEAN) / STD, expected["pixel_values"]) <= 1e-6
    with pytest.raises(UserError, match="<OD> is all that such a prompt may say"):
        architecture.template.render("<OD> cats", 1)


@pytest.mark.parametrize("target", ["onnxruntime", "executorch"])
def test_bundles_answer_as_transformers_does(target: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path / "made")
    request = Request("florence2", checkpoint=str(tmp_path / "made"), max_context=24)
    bundle = export(ExportOptions(request, target, "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    answers = set()
    for photograph, prompt in zip(photographs()[:3], ("<CAPTION>", "<OD>", "Why?"), strict=True):
        answer, _ = session.answer(prompt, [photograph], max_new_tokens=8)
        inputs = processor(text=prompt, images=photograph, return_tensors="pt")
        tokens = made.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=8)
        assert answer == processor.tokenizer.decode(tokens[0, 1:], skip_special_tokens=True).strip()
        answers.add(answer)
    assert len(answers) > 1
    with pytest.raises(UserError, match="this bundle reads 160"):
        session.answer("x" * 160, [], max_new_tokens=1)


def test_published_sizes_count() -> None:
    counted(Florence2)


def test_published_pictures_become_the_published_tokens() -> None:
    base = next(variant.architecture for variant in Florence2.variants() if variant.name == "florence-2-base")
    assert isinstance(base, Florence2)
    assert (base.vision.grid, base.visual_tokens, base.start) == (24, 577, (2, 0))
    absent = Florence2.from_config({"text_config": {"d_model": 1024}})
    assert (absent.vision, absent.positions) == (base.vision, base.positions)


@pytest.mark.parametrize(
    ("vision", "text", "preprocessor", "words"),
    [
        ({"projection_dim": 768}, {}, None, "projection_dim is 768; the text is 1024 wide"),
        ({"num_heads": [4, 8, 16]}, {}, None, "other keys"),
        ({"embed_dim": [128, 256, 512, 1000]}, {}, None, "cannot be split into 32 heads"),
        ({"max_position_embeddings": 20}, {}, None, "24 rows; positions are learned for 20"),
        ({"image_feature_source": ["last_frame"]}, {}, None, "image_feature_source must be spatial_avg_pool"),
        ({"activation_function": "gelu_new"}, {}, None, "gelu"),
        ({}, {"tie_word_embeddings": False}, None, "one vocabulary"),
        ({}, {"decoder_attention_heads": 7}, None, "not a multiple of decoder_attention_heads 7"),
        ({}, {}, {"size": {"shortest_edge": 64}, "do_center_crop": False}, "squares of one size"),
    ],
)
def test_what_is_not_supported_is_named(
    vision: dict[str, Any], text: dict[str, Any], preprocessor: dict[str, Any] | None, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        Florence2.from_config({"vision_config": vision, "text_config": text}, preprocessor)
