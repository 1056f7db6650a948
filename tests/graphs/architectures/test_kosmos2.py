"""KOSMOS-2 from checkpoints that transformers' class wrote: the same embeddings, logits, tokens and text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration, Kosmos2Processor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.kosmos2 import CLIP_LARGE_224, Kosmos2
from graphs.components.text.magneto import SinusoidTable
from graphs.dialogue import Segment
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.picture import from_json
from graphs.preprocess.prompt import read
from graphs.preprocess.tokenizer import load_tokenizer
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.answers import all_logits, greedy_tokens
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, photographs, randomized, raw_pixels, save
from tests.published import counted

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "embed_dim": 48,
    "layers": 2,
    "ffn_dim": 80,
    "attention_heads": 4,
    "vocab_size": 1296,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 3,  # a row of the table of positions too
}
CASES: dict[str, dict[str, Any]] = {
    "published proportions": {},
    "odd": {
        "vision": {**VISION, "hidden_size": 40, "num_attention_heads": 5, "image_size": 50, "patch_size": 7},
        "text": {**TEXT, "embed_dim": 42, "attention_heads": 3, "layer_norm_eps": 1e-3, "activation_function": "relu"},
        "queries": 5,
    },
    "unscaled, another padding": {"text": {**TEXT, "scale_embedding": False, "pad_token_id": 1}, "queries": 1},
}


def reference(vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT, queries: int = 9, std: float = 0.2) -> Any:
    config = Kosmos2Config(vision_config=vision, text_config=text, latent_query_num=queries)
    return randomized(Kosmos2ForConditionalGeneration(config), std)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made = reference(**CASES[case])
    model = load_model(Request("kosmos2", checkpoint=str(save(made, tmp_path))))
    assert isinstance(model.architecture, Kosmos2)
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    pictures = raw_pixels(model.architecture.image_size, 2)
    normal = torch.cat([(torch.from_numpy(pixels) / 255 - MEAN) / STD for pixels in pictures])
    before, after = [256, 5, 60, 7], [9, 33, 4, 18]
    queries, scale = model.architecture.queries, model.architecture.text.embedding_scale
    with torch.no_grad():
        ids = torch.tensor([[9] * 2 * queries])
        whole = torch.ones_like(ids)
        features = made(normal, ids, image_embeds_position_mask=whole).image_embeds.reshape(2, queries, -1)
        for pixels, expected in zip(pictures, features, strict=True):
            (image_embeds,) = runtime.call("vision_encoder", [pixels])
            assert image_embeds.shape == (1, queries, TEXT["embed_dim"] if "odd" not in case else 42)
            assert relative_l2(torch.from_numpy(image_embeds[0]), expected * scale) <= 1e-5
        for count in (0, 1, 2):
            segments: list[Segment] = [before, *(part for pixels in pictures[:count] for part in (pixels, after))]
            ids = torch.tensor([before + ([40] * queries + after) * count])
            places = torch.tensor([[0] * len(before) + ([1] * queries + [0] * len(after)) * count])
            expected = made.text_model(
                ids,
                image_embeds=features[:count] if count else None,
                image_embeds_position_mask=places if count else None,
            ).logits
            assert relative_l2(all_logits(runtime, segments), expected) <= 1e-5
            seen = {"image_embeds": features[:count], "image_embeds_position_mask": places} if count else {}
            tokens = made.text_model.generate(ids, **seen, do_sample=False, max_new_tokens=6, eos_token_id=None)
            found = greedy_tokens(runtime, segments, model.architecture.context, 6)
            assert found == tokens[0, ids.shape[1] :].tolist()


def test_sinusoids_are_transformers() -> None:
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextSinusoidalPositionalEmbedding

    for width in (48, 2048):
        expected = Kosmos2TextSinusoidalPositionalEmbedding(2048, width, 1).weights[2:]
        assert torch.equal(SinusoidTable(width, 2048, 2).table, expected)


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Kosmos2Processor, Path]:
    """A model with its processor, written by `save_pretrained`."""
    directory = tmp_path_factory.mktemp("made") / "kosmos"
    made = reference()
    with torch.no_grad():  # so that answers depend on pictures
        made.image_to_text_projection.dense.weight *= 100
        made.image_to_text_projection.x_attn.v_proj.weight *= 3
        made.text_model.model.embed_tokens.weight *= 0.1
    tokenizer = byte_tokenizer(unk_token="!")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    square = {"height": 48, "width": 48}
    processor = Kosmos2Processor(CLIPImageProcessorPil(size=square, crop_size=square), tokenizer)
    save(made, directory)
    processor.save_pretrained(directory)
    return made, processor, directory


def test_prompts_and_pixels_are_the_processors(assistant: tuple[Any, Kosmos2Processor, Path]) -> None:
    _, processor, directory = assistant
    architecture = load_model(Request("kosmos2", checkpoint=str(directory))).architecture
    assert isinstance(architecture, Kosmos2)
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    assert from_json(architecture.image_processor.to_json()) == architecture.image_processor
    for photograph in photographs():
        expected = processor(text="<grounding> An image of", images=photograph, return_tensors="pt", num_image_tokens=9)
        picture = architecture.image_processor.picture(photograph)
        first, view, last = read(architecture.template, "<grounding> An image of", [picture], tokenizer)
        assert isinstance(first, list)
        assert isinstance(last, list)
        assert not isinstance(view, list)
        assert (view.start, view.stop) == (0, 9)
        ids, places = expected["input_ids"][0], expected["image_embeds_position_mask"][0].bool()
        assert first + last == ids[~places].tolist()
        assert places.nonzero().flatten().tolist() == list(range(len(first), len(first) + 9))
        pixels = torch.from_numpy(picture.arrays[0])
        assert relative_l2((pixels / 255 - MEAN) / STD, expected["pixel_values"]) <= 1e-6
    only = processor(text="An image of", return_tensors="pt")["input_ids"][0].tolist()
    assert read(architecture.template, "An image of", [], tokenizer) == [only]


def test_a_bundle_answers_as_transformers_does(assistant: tuple[Any, Kosmos2Processor, Path], tmp_path: Path) -> None:
    made, processor, directory = assistant
    request = Request("kosmos2", checkpoint=str(directory))
    bundle = export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    answers = set()
    for photograph in photographs()[:3]:
        answer, _ = session.answer("<grounding> It is", [photograph], max_new_tokens=12)
        inputs = processor(
            text="<grounding> It is",
            images=photograph,
            return_tensors="pt",
            num_image_tokens=9,
            first_image_token_id=300,
        )
        tokens = made.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        answers.add(answer)
    assert len(answers) > 1


def test_pictures_become_squares_where_the_published_file_says_so() -> None:
    published = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "use_square_size": True}
    processor = Kosmos2.from_config({}, published).image_processor
    expected = CLIPImageProcessorPil(**published)
    assert Kosmos2.from_config({}).image_processor == processor
    photograph = photographs()[0]
    pixels = torch.from_numpy(processor(photograph))
    assert relative_l2((pixels / 255 - MEAN) / STD, expected(photograph, return_tensors="pt")["pixel_values"]) <= 1e-6


def test_absent_keys_are_transformers_defaults() -> None:
    found, expected = Kosmos2.from_config({}), Kosmos2Config()
    published = next(variant.architecture for variant in Kosmos2.variants() if variant.checkpoint)
    assert found == published
    assert found.vision == replace(CLIP_LARGE_224, image_size=expected.vision_config.image_size)
    text = expected.text_config
    assert (found.queries, found.pad_id) == (expected.latent_query_num, text.pad_token_id)
    for ours, theirs in (("hidden_size", "embed_dim"), ("intermediate_size", "ffn_dim"), ("vocab_size", "vocab_size")):
        assert getattr(found.text, ours) == getattr(text, theirs)
    assert np.isclose(found.text.embedding_scale, text.embed_dim**0.5)


def test_published_sizes_count() -> None:
    counted(Kosmos2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_config": {"attention_heads": 7}}, "not a multiple of attention_heads 7"),
        ({"text_config": {"add_cross_attention": True}}, "add_cross_attention is true"),
        ({"vision_config": {"hidden_act": "quickgelu"}}, "quick_gelu"),
        ({"latent_query_num": 0}, "latent_query_num is 0"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Kosmos2.from_config(change)
