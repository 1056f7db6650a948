"""Qwen2.5-VL from checkpoints that transformers' class wrote: the same windows, positions, logits and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.qwen2_5_vl import Qwen25VL
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.picture import from_json
from graphs.preprocess.windows import WindowProcessor
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.graphs.architectures import qwen
from tests.graphs.architectures.qwen import TEXT
from tests.published import counted

VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 44,
    "out_hidden_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "published shape": {},
    "odd": {
        "vision": {
            **VISION,
            "hidden_size": 36,
            "num_heads": 3,
            "patch_size": 3,
            "spatial_merge_size": 3,
            "temporal_patch_size": 3,
            "window_size": 30,
            "fullatt_block_indexes": [0, 2],
            "tokens_per_second": 1,
        },
        "tie_word_embeddings": True,
    },
}


def reference(
    directory: Path, vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT, **options: Any
) -> tuple[Any, Any]:
    return qwen.reference(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, directory, vision, text, **options)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made, images = reference(tmp_path, **CASES[case])
    model = load_model(Request("qwen2_5_vl", checkpoint=str(tmp_path)))
    assert isinstance(model.architecture, Qwen25VL)
    seconds = images.temporal_patch_size / model.architecture.processor.fps
    qwen.compare(made, images, model, second_per_grid_ts=torch.tensor([seconds]))


def test_windows_are_transformers() -> None:
    processor = WindowProcessor(patch_size=4, min_pixels=64, max_pixels=8192, window=3)
    for shown in [*qwen.pictures(), qwen.frames(5)]:
        patches = processor.patches(shown)
        t, h, w, _ = patches.shape
        pixels, places, frames, order = processor.arrays(patches)
        index, ends = get_vision_window_index(torch.tensor([[t, h, w]]), 2, 24, 4)
        inside = frames.reshape(len(frames), -1, 4)[:, :, 0] >= 0
        assert inside.sum(1).tolist() == (ends.diff() // 4).tolist()
        assert np.argsort(order).tolist() == index.tolist()
        units = pixels.reshape(-1, 4, pixels.shape[-1])[order]
        plain = super(WindowProcessor, processor).arrays(patches)
        assert np.array_equal(units, plain[0])
        assert np.array_equal(places.reshape(-1, 4, 2)[order], plain[1])
        assert np.array_equal(frames.reshape(-1, 4)[order], plain[2])


def test_bundle_answers_as_transformers_does(tmp_path: Path) -> None:
    made, images = reference(tmp_path / "made")
    request = Request("qwen2_5_vl", checkpoint=str(tmp_path / "made"), max_context=256)
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
    inputs = {**images(shown, return_tensors="pt"), "mm_token_type_ids": (ids == qwen.IMAGE).int()}
    tokens = made.generate(ids, **inputs, do_sample=False, max_new_tokens=8)
    assert answer == tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_published_sizes_count() -> None:
    counted(Qwen25VL)


def test_bounds_of_a_bundle() -> None:
    published = next(v.architecture for v in Qwen25VL.variants() if v.name == "qwen2.5-vl-3b")
    assert isinstance(published, Qwen25VL)
    processor = published.image_processor
    assert processor.most_windows == 144
    for side in (30, 448, 1000, 3000):
        pixels, *_, order = processor(Image.new("RGB", (side, 3 * side)))
        assert len(pixels) <= 144
        assert len(order) <= 1024
    with pytest.raises(UserError, match="240 windows, mostly empty"):
        processor([Image.new("RGB", (56, 56))] * 480)
    slow = WindowProcessor(time_scale=2.0, fps=0.05)
    with pytest.raises(UserError, match="80 steps apart, outrun its 8 embeddings"):
        slow.picture([Image.new("RGB", (56, 56))] * 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out_hidden_size": 64}, "out_hidden_size is 64, the decoder's hidden_size is 8192"),
        ({"window_size": 20}, "window_size 20 is smaller than the 28 pixels"),
        ({"fullatt_block_indexes": "all"}, "fullatt_block_indexes must be a list"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_type is 'default'"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Qwen25VL.from_config({"vision_config": {"hidden_size": 1280, "out_hidden_size": 8192, **change}})
