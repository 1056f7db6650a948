"""Idefics 2 from checkpoints that transformers' class wrote: the same patches, embeddings, logits, tokens and text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    LlamaConfig,
    MistralConfig,
)
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.idefics2 import MISTRAL, Idefics2
from graphs.dialogue import Dialogue
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.navit import NavitProcessor
from graphs.preprocess.picture import from_json
from graphs.preprocess.prompt import read
from graphs.preprocess.tokenizer import load_tokenizer
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, odd_pictures, photographs, randomized, save
from tests.published import counted

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 268,
    "max_position_embeddings": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
PERCEIVER: dict[str, Any] = {
    "hidden_size": 48,
    "resampler_n_latents": 5,
    "resampler_depth": 2,
    "resampler_n_heads": 4,
    "resampler_head_dim": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
CASES: dict[str, dict[str, Any]] = {
    "split": {"split": True},
    "whole": {"text": {**TEXT, "sliding_window": 40}},
    "odd, llama, tied": {
        "vision": {**VISION, "hidden_size": 40, "num_attention_heads": 5, "image_size": 50, "patch_size": 7},
        "text": {**TEXT, "hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 10},
        "decoder": LlamaConfig,
        "perceiver": {**PERCEIVER, "num_key_value_heads": 4, "hidden_act": "gelu"},
        "sizes": (17, 71),
        "split": True,
        "tie_word_embeddings": True,
    },
}


def reference(
    directory: Path,
    vision: dict[str, Any] = VISION,
    decoder: type = MistralConfig,
    text: dict[str, Any] = TEXT,
    perceiver: dict[str, Any] = PERCEIVER,
    sizes: tuple[int, int] = (19, 45),
    split: bool = False,
    **options: Any,
) -> tuple[Any, Idefics2Processor]:
    """A model and its processor, both written into `directory`."""
    edges = {"shortest_edge": sizes[0], "longest_edge": sizes[1]}
    images = Idefics2ImageProcessorPil(size=edges, do_image_splitting=split)
    processor = Idefics2Processor(images, byte_tokenizer(), image_seq_len=perceiver["resampler_n_latents"])
    config = Idefics2Config(
        vision_config=copy.copy(vision),
        text_config=decoder(**text),
        perceiver_config=copy.copy(perceiver),
        image_token_id=processor.image_token_id,
        **options,
    )
    made = randomized(Idefics2ForConditionalGeneration(config))
    save(made, directory)
    processor.save_pretrained(directory)
    return made, processor


def pictures() -> list[Image.Image]:
    """Photographs, and shapes that are stretched."""
    return odd_pictures((90, 7), (13, 400), (24, 24))


def patches(pixels: torch.Tensor, mask: torch.Tensor, side: int) -> torch.Tensor:
    """Full patches [N, 3, side, side] of a padded picture [3, H, W] whose pixels `mask` [H, W] marks."""
    rows, columns = int(mask[:, 0].sum()) // side, int(mask[0].sum()) // side
    cut = pixels[:, : rows * side, : columns * side].reshape(3, rows, side, columns, side)
    return cut.permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path, **CASES[case])
    model = load_model(Request("idefics2", checkpoint=str(tmp_path)))
    architecture = model.architecture
    assert isinstance(architecture, Idefics2)
    runtime = EagerRuntime(trace(architecture, model.weights))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    prepare = architecture.image_processor
    lengths = set()
    with torch.no_grad():
        for image in pictures():
            given = prepare.picture(image).arrays
            inputs = processor.image_processor(image, return_tensors="pt")
            expected = [inputs["pixel_values"][0], inputs["pixel_attention_mask"][0]]
            for ours, real, pixels, mask in zip(given[0], given[2], *expected, strict=True):
                wanted = patches(pixels, mask, prepare.side)
                assert relative_l2((torch.from_numpy(ours[real == 1]) / 255 - 0.5) / 0.5, wanted) <= 1e-6
                assert prepare.patches[0] <= real.sum() <= prepare.patches[1]
            (image_embeds,) = runtime.call("vision_encoder", given)
            features = torch.cat(made.get_image_features(**inputs).pooler_output)
            assert image_embeds.shape[1] == architecture.visual_tokens
            assert relative_l2(torch.from_numpy(image_embeds[0]), features) <= 1e-5
            lengths.add(given[0].shape[1])
        assert len(lengths) > 3
        for count in (0, 1, 2):
            seen = pictures()[1 : 1 + count]
            text = architecture.template.render("Hm?", count)
            inputs = processor(text=text, images=seen or None, return_tensors="pt")
            pieces = read(architecture.template, "Hm?", [prepare.picture(image) for image in seen], tokenizer)
            prompt = Dialogue(runtime).embed(pieces)
            runtime.reset()
            (logits,) = runtime.call("text_decoder", [prompt.embeds_1SD, np.arange(prompt.length)])
            assert relative_l2(torch.from_numpy(logits), made(**inputs).logits) <= 1e-5
            expected = made.generate(**inputs, do_sample=False, max_new_tokens=5, eos_token_id=None)
            *_, last = generate(runtime, pieces, context=architecture.context, max_new_tokens=5)
            assert last.tokens == expected[0, prompt.length :].tolist()


def test_patches_that_fill_up_change_nothing(tmp_path: Path) -> None:
    """A picture gives the same embeddings however many patches that are not real follow its own."""
    reference(tmp_path)
    model = load_model(Request("idefics2", checkpoint=str(tmp_path)))
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    assert isinstance(model.architecture, Idefics2)
    pixels, positions, real = model.architecture.image_processor(photographs()[3])
    more = [np.pad(array, [(0, 0), (0, 3)] + [(0, 0)] * (array.ndim - 2)) for array in (pixels, positions, real)]
    more[0][:, -3:] = 77
    one, other = (runtime.call("vision_encoder", given)[0] for given in ((pixels, positions, real), more))
    assert relative_l2(torch.from_numpy(other), torch.from_numpy(one)) <= 1e-6
    more[2][:] = 1
    (seen,) = runtime.call("vision_encoder", more)
    assert relative_l2(torch.from_numpy(seen), torch.from_numpy(one)) > 1e-2


def test_published_sizes_of_pictures() -> None:
    architecture = next(v.architecture for v in Idefics2.variants() if v.name == "idefics2-8b")
    assert isinstance(architecture, Idefics2)
    processor = architecture.image_processor
    assert (processor.shortest, processor.longest, processor.patches) == (378, 980, (729, 4900))
    assert processor.picture(Image.new("RGB", (640, 427))).text.count("<image>") == 320 == architecture.visual_tokens
    assert processor.resized(427, 640) == (427, 640)
    assert processor.resized(2000, 3000) == (653, 980)
    assert from_json(processor.to_json()) == processor
    with pytest.raises(UserError, match="1 x 9 pixels has no quarters"):
        processor(Image.new("RGB", (1, 9)))


def test_bundles_answer_as_transformers_does(tmp_path: Path) -> None:
    made, processor = reference(tmp_path / "made", split=True)
    request = Request("idefics2", checkpoint=str(tmp_path / "made"), max_context=128)
    bundle = export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    for seen in ([photographs()[1]], photographs()[2:]):
        answer, _ = session.answer("Hm?", seen, max_new_tokens=8)
        inputs = processor(text=session.template.render("Hm?", len(seen)), images=seen, return_tensors="pt")
        tokens = made.generate(**inputs, do_sample=False, max_new_tokens=8)
        expected = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == expected.strip()


def test_published_sizes_count() -> None:
    counted(Idefics2)


def test_the_hubs_keys_are_read() -> None:
    """What the config.json of HuggingFaceM4/idefics2-8b says; the resampler's own width is not among it."""
    config = {
        "perceiver_config": {"model_type": "idefics2"},
        "text_config": {
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "rms_norm_eps": 1e-05,
            "sliding_window": 4096,
            "vocab_size": 32003,
        },
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 980,
            "intermediate_size": 4304,
            "model_type": "idefics2",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
    }
    found, published = Idefics2.from_config(config), Idefics2.variants()[1].architecture
    assert isinstance(published, Idefics2)
    assert (found.vision, found.text, found.perceiver) == (published.vision, MISTRAL, published.perceiver)
    assert found.image_processor == published.image_processor
    # One of another width than the decoder's takes the decoder's, as transformers' configuration does
    narrow = {**config, "text_config": {**config["text_config"], "hidden_size": 1024, "head_dim": 32}}
    expected = Idefics2Config(**copy.deepcopy(narrow)).perceiver_config
    perceiver = Idefics2.from_config(narrow).perceiver
    assert (perceiver.hidden_size, perceiver.rms_norm_eps) == (expected.hidden_size, expected.rms_norm_eps)


@pytest.mark.parametrize(
    ("config", "preprocessor", "words"),
    [
        ({"vision_config": {"model_type": "idefics2_visoin"}}, {}, "idefics2_vision"),
        ({"text_config": {"model_type": "gemma"}}, {}, "mistral"),
        ({"perceiver_config": {"resampler_n_heads": 6}}, {}, "6 is not a multiple of num_key_value_heads 4"),
        ({}, {"size": {"height": 5, "width": 5}}, "must have shortest_edge and longest_edge"),
        ({}, {"do_resize": False}, "patches are without number"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], preprocessor: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Idefics2.from_config(config, preprocessor)


def test_without_a_preprocessor_sizes_follow_the_tower() -> None:
    assert NavitProcessor.from_config(None, 14, 70, 64) == NavitProcessor(14, 70, 64)
