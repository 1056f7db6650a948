"""BLIP-2 from checkpoints that transformers' class wrote: the same embeddings, logits, tokens and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    OPTConfig,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.blip2 import Blip2
from graphs.components.connectors.qformer import QFormerConfig
from graphs.components.vision.blip import EVA_GIANT
from graphs.dialogue import Dialogue, Segment
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.lowered import lowers
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, photographs, randomized, raw_pixels, save
from tests.published import counted

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)

VISION: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
QFORMER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
OPT: dict[str, Any] = {
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 264,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
T5: dict[str, Any] = {
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 80,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 5,
    "vocab_size": 264,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "decoder_start_token_id": 258,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
LLAMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 128,
}

CASES: dict[str, dict[str, Any]] = {
    "opt": {},
    "opt, odd": {
        "vision": {**VISION, "num_attention_heads": 5, "image_size": 50, "patch_size": 7, "hidden_act": "quick_gelu"},
        "qformer": {**QFORMER, "num_hidden_layers": 5, "cross_attention_frequency": 3, "use_qformer_text_input": True},
        "text": OPTConfig(**{**OPT, "enable_bias": False, "activation_function": "gelu"}),
        "queries": 5,
    },
    "t5": {"text": T5Config(**T5)},
    "flan t5": {"text": T5Config(**{**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})},
    "llama": {"text": LlamaConfig(**LLAMA)},
}


def reference(
    vision: dict[str, Any] = VISION, qformer: dict[str, Any] = QFORMER, text: Any = None, queries: int = 7
) -> Any:
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**vision),
        qformer_config=Blip2QFormerConfig(**qformer),
        text_config=text or OPTConfig(**OPT),
        num_query_tokens=queries,
        image_token_index=259,
    )
    return randomized(Blip2ForConditionalGeneration(config))


def equal(made: Any, directory: Path) -> None:
    """Embeddings, logits and greedy tokens of a checkpoint, against the model that it was written from."""
    model = load_model(Request("blip2", checkpoint=str(directory)))
    architecture = model.architecture
    assert isinstance(architecture, Blip2)
    runtime = EagerRuntime(trace(architecture, model.weights))
    pictures = raw_pixels(architecture.image_size, 2)
    normal = torch.cat([(torch.from_numpy(pixels) / 255 - MEAN) / STD for pixels in pictures])
    seq2seq = made.config.text_config.is_encoder_decoder
    before, after = [1, 5, 60, 7], [9, 33, 4, 18]
    with torch.no_grad():
        features = made.get_image_features(normal).pooler_output
        for pixels, expected in zip(pictures, features, strict=True):
            (image_embeds,) = runtime.call("vision_encoder", [pixels])
            assert image_embeds.shape == (1, architecture.visual_tokens, architecture.text.hidden_size)
            assert relative_l2(torch.from_numpy(image_embeds[0]), expected) <= 1e-5
        place = [259] * architecture.visual_tokens
        for count in (0, 1, 2):
            segments: list[Segment] = [before, *(part for pixels in pictures[:count] for part in (pixels, after))]
            ids = torch.tensor([before + (place + after) * count])
            embeds = made.get_input_embeddings()(ids)
            embeds[ids == 259] = features[:count].flatten(0, 1)
            start = (258,) if seq2seq else ()
            dialogue = Dialogue(runtime, start)
            runtime.reset()
            logits = torch.from_numpy(dialogue.prefill(dialogue.embed(segments)))
            decoded = {"decoder_input_ids": torch.tensor([[258]])} if seq2seq else {}
            expected = made.language_model(inputs_embeds=embeds, **decoded).logits[0, -1]
            assert relative_l2(logits, expected) <= 1e-5
            if count:
                whole = made(normal[:count], ids, **decoded).logits[0, -1] if count == 1 else expected
                assert relative_l2(logits, whole) <= 1e-5
            options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "min_new_tokens": 6}
            tokens = made.language_model.generate(inputs_embeds=embeds, **options)[0].tolist()
            *_, last = generate(runtime, segments, context=architecture.context, max_new_tokens=6, start=start)
            assert last.tokens == tokens[-6:]


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made = reference(**CASES[case])
    equal(made, save(made, tmp_path))


@pytest.mark.parametrize("text", [OPTConfig(**OPT), T5Config(**{**T5, "tie_word_embeddings": False})])
def test_the_layout_of_the_hub_repeats_what_is_tied(text: Any, tmp_path: Path) -> None:
    """Published files hold tied tensors under each of their names, and Flan-T5's heads are not tied at all."""
    made = reference(text=text)
    if text.model_type == "t5":
        made.language_model.lm_head.weight = torch.nn.Parameter(torch.randn(264, 48))
    made.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    assert len(tensors) > len(load_file(tmp_path / "model.safetensors"))
    save_file(tensors, tmp_path / "model.safetensors")
    equal(made, tmp_path)


def assistant(text: str, directory: Path) -> tuple[Any, Blip2Processor]:
    """A model with its processor, written by `save_pretrained`: what a fine-tune looks like on a disk."""
    tokenizer = byte_tokenizer()
    around = {"opt": "<s> $A", "t5": "$A </s>"}[text]
    specials = [("<s>", 256), ("</s>", 257)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=specials)
    made = reference(text={"opt": OPTConfig(**OPT), "t5": T5Config(**T5)}[text])
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = Blip2Processor(images, tokenizer, num_query_tokens=7)
    save(made, directory)
    processor.save_pretrained(directory)
    return made, processor


@pytest.mark.parametrize("text", ["opt", "t5"])
def test_bundles_answer_as_transformers_does(text: str, tmp_path: Path) -> None:
    made, processor = assistant(text, tmp_path / "made")
    request = Request("blip2", checkpoint=str(tmp_path / "made"))
    session = Session.open(
        Bundle.open(export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent))
    )
    answers = set()
    for photograph in photographs():
        inputs = processor(text="Question: what? Answer:", images=photograph, return_tensors="pt")
        pixels = torch.from_numpy(session.processor(photograph))  # type: ignore[misc]
        assert relative_l2((pixels / 255 - MEAN) / STD, inputs["pixel_values"]) <= 1e-6
        read = 0 if made.config.text_config.is_encoder_decoder else inputs["input_ids"].shape[1]
        tokens = made.generate(**inputs, do_sample=False, max_new_tokens=9)[0, read:]
        answer, _ = session.answer("Question: what? Answer:", [photograph], max_new_tokens=9)
        assert answer == processor.decode(tokens, skip_special_tokens=True).strip()
        answers.add(answer)
    assert len(answers) > 1


def test_tiny_lowers(tmp_path: Path) -> None:
    manifest = lowers(Request("blip2", "tiny-t5"), "coreml", tmp_path / "b")
    assert set(manifest["methods"]) == {"vision_encoder", "token_embedding", "text_encoder", "text_decoder"}


def test_published_sizes_count() -> None:
    counted(Blip2)


def test_absent_keys_are_transformers_defaults() -> None:
    found, expected = Blip2.from_config({}), Blip2Config()
    assert (found.vision, found.qformer, found.family) == (EVA_GIANT, QFormerConfig(), "opt")
    for ours, theirs in ((found.vision, expected.vision_config), (found.qformer.blocks, expected.qformer_config)):
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps"):
            assert getattr(ours, key) == getattr(theirs, key)
    assert found.text.intermediate_size == expected.text_config.ffn_dim
    t5, theirs = Blip2.from_config({"text_config": {"model_type": "t5"}}), T5Config()
    assert t5.t5 is not None
    assert (t5.text.hidden_size, t5.text.head_width, t5.text.vocab_size) == (theirs.d_model, theirs.d_kv, 32128)
    assert (t5.t5.encoder_layers, t5.t5.max_distance, t5.t5.scaled_output) == (6, 128, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_config": {"qkv_bias": False}}, "qkv_bias is false"),
        ({"text_config": {"model_type": "op"}}, "opt"),
        ({"text_config": {"do_layer_norm_before": False}}, "do_layer_norm_before is false"),
        ({"text_config": {"word_embed_proj_dim": 512}}, "word_embed_proj_dim is not hidden_size"),
        ({"text_config": {"model_type": "t5", "feed_forward_proj": "gated-gelo"}}, "gated-gelu"),
        ({"qformer_config": {"num_attention_heads": 7}}, "hidden_size 768 is not a multiple of num_attention_heads 7"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Blip2.from_config(change)
