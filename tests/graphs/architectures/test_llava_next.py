"""LLaVA-NeXT from checkpoints that transformers' class wrote: the same tiles, embeddings, logits and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.llava_next import PINPOINTS, LlavaNext
from graphs.dialogue import Dialogue
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.tiling import TilingProcessor
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, odd_pictures, randomized, save
from tests.published import counted

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
GRIDS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 512,
    "eos_token_id": 257,
}
CASES: dict[str, dict[str, Any]] = {
    "vicuna": {},
    "odd": {"vision": {**VISION, "image_size": 30, "patch_size": 7}, "grids": [[30, 60], [90, 30], [60, 90]]},
    "siglip, mistral": {"tower": SiglipVisionConfig, "decoder": MistralConfig, "strategy": "full"},
}


def reference(
    directory: Path,
    tower: type = CLIPVisionConfig,
    vision: dict[str, Any] = VISION,
    decoder: type = LlamaConfig,
    grids: list[list[int]] = GRIDS,
    strategy: str = "default",
) -> tuple[Any, LlavaNextProcessor]:
    """A model and its processor, both written into `directory`."""
    tokenizer = byte_tokenizer()
    config = LlavaNextConfig(
        vision_config=tower(**vision),
        text_config=decoder(**TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
        vision_feature_select_strategy=strategy,
    )
    made = randomized(LlavaNextForConditionalGeneration(config))
    side = vision["image_size"]
    square = {"height": side, "width": side}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=grids)
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
    )
    save(made, directory)
    processor.save_pretrained(directory)
    return made, processor


def pictures() -> list[Image.Image]:
    """Photographs, and shapes that are hard to fit."""
    return odd_pictures((90, 7), (13, 400), (24, 24))


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path, **CASES[case])
    model = load_model(Request("llava_next", checkpoint=str(tmp_path)))
    assert isinstance(model.architecture, LlavaNext)
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    before, after = [1, 5, 60, 7], [9, 33, 4]
    lengths = set()
    with torch.no_grad():
        for picture in pictures():
            tiles, packing = model.architecture.image_processor(picture)
            inputs = processor.image_processor(picture, return_tensors="pt")
            assert relative_l2((torch.from_numpy(tiles) / 255 - MEAN) / STD, inputs["pixel_values"][0]) <= 1e-6
            (image_embeds,) = runtime.call("vision_encoder", [tiles, packing])
            (features,) = made.get_image_features(**inputs).pooler_output
            assert relative_l2(torch.from_numpy(image_embeds[0]), features) <= 1e-5
            assert image_embeds.shape[1] <= model.architecture.visual_tokens
            lengths.add(len(features))
        assert len(lengths) > 2
        for count in (0, 2):
            seen = pictures()[:count]
            given = [model.architecture.image_processor(picture) for picture in seen]
            segments = [before, *(part for tiles in given for part in (tiles, after))]
            place = [[made.config.image_token_id] * len(packing) for _, packing in given]
            ids = torch.tensor([before + [token for one in place for token in one + after]])
            inputs = dict(processor.image_processor(seen, return_tensors="pt")) if seen else {}
            inputs_embeds = Dialogue(runtime).embed(segments).embeds_1SD
            runtime.reset()
            (logits,) = runtime.call("text_decoder", [inputs_embeds, np.arange(ids.shape[1])])
            assert relative_l2(torch.from_numpy(logits), made(ids, **inputs).logits) <= 1e-5
            expected = made.generate(ids, **inputs, do_sample=False, max_new_tokens=5, eos_token_id=None)
            *_, last = generate(runtime, segments, context=model.architecture.context, max_new_tokens=5)
            assert last.tokens == expected[0, ids.shape[1] :].tolist()


def test_published_resolutions_make_the_published_numbers_of_tokens() -> None:
    tiling = TilingProcessor(336, 24, PINPOINTS)
    assert tiling.tiles == (3, 5)
    assert tiling.most_tokens == 576 + 48 * 49 == 2928
    assert len(tiling(Image.new("RGB", (3000, 1000)))[1]) == 576 + 24 * 73


def test_a_bundle_answers_as_transformers_does(tmp_path: Path) -> None:
    made, processor = reference(tmp_path / "made")
    request = Request("llava_next", checkpoint=str(tmp_path / "made"), max_context=256)
    bundle = export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    for picture in pictures()[:3]:
        answer, _ = session.answer("Hm?", [picture], max_new_tokens=8)
        text = session.template.render("Hm?", 1)
        inputs = processor(text=text, images=picture, return_tensors="pt")
        tokens = made.generate(**inputs, do_sample=False, max_new_tokens=8)
        expected = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == expected.strip()


def test_published_sizes_count() -> None:
    counted(LlavaNext)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_grid_pinpoints": [[336, 600]]}, "multiples of the tower's image_size, 336"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints"),
        ({"vision_feature_select_strategy": "full"}, "577 tokens, which are not 576"),
        ({"hidden_size": 64}, "original layout"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LlavaNext.from_config(change)
