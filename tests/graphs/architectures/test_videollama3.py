"""VideoLLaMA 3 from checkpoints that transformers' class wrote: the same patches, thinning, logits and tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.videollama3 import VideoLlama3
from graphs.dialogue import Dialogue
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.picture import from_json
from graphs.preprocess.thinned import ThinningProcessor, centre
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.graphs.architectures import qwen
from tests.numbers import relative_l2
from tests.pretrained import photographs, randomized, save
from tests.published import counted

VISION = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}
TEXT = {
    **qwen.TEXT,
    "model_type": "qwen2",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "tie_word_embeddings": False,
}
CASES: dict[str, dict[str, Any]] = {
    "published shape": {},
    "odd": {
        "vision": {**VISION, "hidden_size": 36, "num_attention_heads": 3, "patch_size": 3, "hidden_act": "gelu"},
        "text": {**TEXT, "model_type": "llama", "tie_word_embeddings": True},
        "merge": 3,
    },
}
AUTHORS = {
    "model.vision_model.": "model.vision_encoder.",
    "model.projector.": "model.mm_projector.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}


def reference(
    directory: Path, vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT, merge: int = 1
) -> tuple[Any, VideoLlama3ImageProcessorPil]:
    """A random model, its image processor and a tokenizer, written into `directory`."""
    config = VideoLlama3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=qwen.IMAGE,
        video_token_id=qwen.VIDEO,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    made = randomized(VideoLlama3ForConditionalGeneration(config))
    side = vision["patch_size"] * merge
    images = VideoLlama3ImageProcessorPil(
        patch_size=vision["patch_size"],
        merge_size=merge,
        size={"shortest_edge": 4 * side**2, "longest_edge": 60 * side**2},
    )
    save(made, directory)
    images.save_pretrained(directory)
    qwen.tokenizer().save_pretrained(directory)
    return made, images


def still_video() -> list[Image.Image]:
    """A part of a photograph in which one corner moves, after a while nothing, then everything."""
    china = photographs()[0].resize((96, 72))
    first = china.crop((20, 10, 68, 46))
    second = first.copy()
    second.paste(china.crop((30, 20, 46, 32)), (0, 0))
    return [first, second, second, china.crop((30, 20, 78, 56))]


def video_inputs(processor: ThinningProcessor, shown: list[Image.Image]) -> dict[str, torch.Tensor]:
    """A video as transformers' model takes it: frames in turn, embeddings that change little left out."""
    like, patch, merge = processor.of_video(len(shown)), processor.patch_size, processor.video_merge_size
    images = VideoLlama3ImageProcessorPil(
        patch_size=patch,
        merge_size=merge,
        size={"shortest_edge": min(like.min_pixels, like.max_pixels), "longest_edge": like.max_pixels},
    )
    made = [images(frame, return_tensors="pt") for frame in shown]
    pixels = torch.stack([one["pixel_values"] for one in made])
    _, h, w = made[0]["image_grid_thw"][0].tolist()
    units = pixels.reshape(len(shown), -1, merge**2 * pixels.shape[-1])
    moved = F.pad((units[1:] - units[:-1]).abs().mean(-1) * 255, (0, 0, 1, 0), value=1.0)
    kept = moved > 0.1
    kept[:, 0] |= ~kept.any(1)
    return {
        "pixel_values_videos": pixels.flatten(0, 1),
        "video_grid_thw": torch.tensor([[len(shown), h, w]]),
        "video_merge_sizes": torch.tensor([merge]),
        "video_compression_mask": kept.flatten(),
    }


@pytest.mark.parametrize("case", [*CASES, "of the authors"])
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made, images = reference(tmp_path, **CASES.get(case, {}))
    if case not in CASES:
        written = json.loads((tmp_path / "config.json").read_text())
        qwen.renamed(tmp_path, AUTHORS, {**written["text_config"], "vision_encoder_config": written["vision_config"]})
    model = load_model(Request("videollama3", checkpoint=str(tmp_path)))
    assert isinstance(model.architecture, VideoLlama3)
    side = (model.architecture.vision.patch_size * 2) ** 2
    bounds = {"video_min_pixels": 4 * side, "video_max_pixels": 160 * side}  # no keys of a checkpoint say
    processor = replace(model.architecture.image_processor, **bounds)
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    seen = [(processor.picture(shown), dict(images(shown, return_tensors="pt"))) for shown in qwen.pictures()]
    with torch.no_grad():
        for picture, inputs in seen:
            normal = torch.from_numpy(picture.arrays[0]) / 127.5 - 1
            assert relative_l2(normal, inputs["pixel_values"]) <= 1e-6
            (features,) = made.model.get_image_features(**inputs).pooler_output
            (embeds,) = runtime.call("vision_encoder", picture.arrays)
            assert relative_l2(torch.from_numpy(embeds[0]), features) <= 1e-5
        video, moving = processor.picture(still_video()), video_inputs(processor, still_video())
        kept = moving["video_compression_mask"]
        assert 0 < kept.sum() < len(kept)
        named = {key: moving[key] for key in ("pixel_values_videos", "video_grid_thw", "video_merge_sizes")}
        (features,) = made.model.get_video_features(**named).pooler_output
        (embeds,) = runtime.call("vision_encoder", video.arrays)
        assert relative_l2(torch.from_numpy(embeds[0]), features[kept]) <= 1e-5
        counts = kept.reshape(4, -1).sum(1).tolist()
        marks = [processor.image * count for count in counts]
        assert video.text == ",".join(f"Time {moment}.0s:{mark}" for moment, mark in enumerate(marks))
        for chosen in ([], seen[:1], [seen[3], (video, moving), seen[2]]):
            segments: list[Any] = [qwen.BEFORE]
            ids = list(qwen.BEFORE)
            for picture, inputs in chosen:
                segments += [picture.arrays, qwen.AFTER]
                mark = qwen.VIDEO if inputs is moving else qwen.IMAGE
                ids += [mark] * len(picture.arrays[-1]) + qwen.AFTER
            whole = qwen.joined([inputs for _, inputs in chosen])
            embedded = Dialogue(runtime).embed(segments).embeds_1SD
            runtime.reset()
            (logits,) = runtime.call("text_decoder", [embedded, np.arange(len(ids))])
            assert relative_l2(torch.from_numpy(logits), made(torch.tensor([ids]), **whole).logits) <= 1e-5
            expected = made.generate(torch.tensor([ids]), **whole, do_sample=False, max_new_tokens=5, eos_token_id=None)
            *_, last = generate(runtime, segments, context=model.architecture.context, max_new_tokens=5)
            assert last.tokens == expected[0, len(ids) :].tolist()


def test_bilinear_halving_is_the_mean_of_the_centre() -> None:
    for merge in (1, 2, 3, 4):
        grid = torch.arange(merge * merge, dtype=torch.float64).sin().reshape(1, 1, merge, merge)
        expected = F.interpolate(grid, size=(1, 1), mode="bilinear").item()
        assert grid.flatten()[centre(merge)].mean().item() == pytest.approx(expected)


def test_bundle_answers_as_transformers_does(tmp_path: Path) -> None:
    made, images = reference(tmp_path / "made")
    request = Request("videollama3", checkpoint=str(tmp_path / "made"), max_context=512)
    bundle = export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    processor = load_model(request).architecture.image_processor
    assert processor is not None
    assert from_json(processor.to_json()) == session.processor == processor
    tokenizer = qwen.tokenizer()
    shown = qwen.pictures()[1]
    answer, _ = session.answer("Hm?", [shown], max_new_tokens=8)
    text = session.template.render("Hm?", 1).replace("<|image_pad|>", processor.picture(shown).text)
    ids = torch.tensor([tokenizer.encode(text)])
    tokens = made.generate(ids, **images(shown, return_tensors="pt"), do_sample=False, max_new_tokens=8)
    assert answer == tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_published_sizes_count() -> None:
    counted(VideoLlama3)


def test_bounds_of_a_bundle() -> None:
    published = next(v.architecture for v in VideoLlama3.variants() if v.name == "videollama3-2b")
    assert isinstance(published, VideoLlama3)
    processor = published.image_processor
    pixels, _, _, units = processor(Image.new("RGB", (4000, 3000)))
    assert pixels.shape == (972, 588)
    assert len(units) == 972
    pixels, _, frames, units = processor([Image.new("RGB", (640, 480))] * 8)
    assert pixels.shape[0] == frames.shape[0] <= 4096
    assert len(units) == pixels.shape[0] // 32 + 7  # the first frame, and one embedding of each that follows
    small = replace(processor, min_pixels=1)
    pixels, places, frames, units = small(Image.new("RGB", (14, 14), "white"))
    assert (len(pixels), len(places), frames.tolist(), units.tolist()) == (4, 4, [0, -1, -1, -1], [[0, 0, 0, 0]])
    with pytest.raises(UserError, match="more embeddings than the 1024"):
        processor([Image.new("RGB", (56, 56))] * 1100)


@pytest.mark.parametrize(
    ("config", "preprocessor", "words"),
    [
        ({"text_config": {"model_type": "gemma"}}, {}, "model_type is 'gemma'"),
        ({"vision_config": {"num_attention_heads": 7}}, {}, "width 768 does not split into 7 heads"),
        ({}, {"patch_size": 14}, "patch_size is 14, the tower's is 16"),
        ({"vision_encoder_config": {}, "mm_projector_type": "linear"}, {}, "mm_projector_type is 'linear'"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], preprocessor: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        VideoLlama3.from_config({"text_config": {"hidden_size": 64}, **config}, preprocessor)
