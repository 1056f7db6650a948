"""Pictures fitted into squares; that they equal transformers' is shown with the systems that use them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from graphs.preprocess.letterbox import LetterboxProcessor, letterboxed
from graphs.preprocess.letterbox_pair import LetterboxPairProcessor
from graphs.preprocess.picture import from_json


@pytest.mark.parametrize(
    ("size", "box"),
    [((100, 50), (0, 8, 32, 24)), ((50, 100), (8, 0, 24, 32)), ((300, 3), (0, 13, 32, 19)), ((9, 9), (0, 0, 32, 32))],
)
def test_the_picture_is_centred_between_bars(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    square = np.asarray(letterboxed(Image.new("RGB", size, (9, 8, 7)), 32, 6, Image.Resampling.BICUBIC, (1, 2, 3)))
    assert square.shape == (32, 32, 3)
    left, top, right, bottom = box
    inside = np.zeros((32, 32), bool)
    inside[top:bottom, left:right] = True
    assert (square[inside] == (9, 8, 7)).all()
    assert (square[~inside] == (1, 2, 3)).all()


def test_a_prompt_reads_marks_for_every_embedding() -> None:
    picture = Image.new("RGB", (20, 10))
    assert LetterboxProcessor(16).picture(picture).text == ""
    marked = LetterboxProcessor(16, begin="<a>", mark="<b>", end="<c>", tokens=3)
    assert marked.picture(picture).text == "<a><b><b><b><c>"


@pytest.mark.parametrize("processor", [LetterboxProcessor(16, bars=(1, 2, 3)), LetterboxPairProcessor(16, 40, least=3)])
def test_a_manifest_keeps_them(processor: LetterboxProcessor | LetterboxPairProcessor) -> None:
    assert from_json(processor.to_json()) == processor


def test_the_small_square_is_made_of_the_large_one() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 60, 3), np.uint8)
    small, large = LetterboxPairProcessor(16, 40)(Image.fromarray(noise))
    whole = Image.fromarray(large[0].transpose(1, 2, 0)).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(small[0].transpose(1, 2, 0), np.asarray(whole))
