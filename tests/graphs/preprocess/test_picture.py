"""Processors through their records, and prompts in which pictures have texts of their own."""

from __future__ import annotations

import json

import numpy as np
import pytest

from graphs.errors import UserError
from graphs.preprocess.image import ImageProcessor
from graphs.preprocess.picture import Picture, View, from_json
from graphs.preprocess.prompt import PromptTemplate, read
from graphs.preprocess.tiling import TilingProcessor


class Words:
    """A tokenizer of single characters, but for `<image>`."""

    bos_id = 1
    adds_bos = True
    eos_ids = (2,)
    vocab_size = 300

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text.replace("<image>", "\x00")]

    def decode(self, ids: object, skip_special: bool = True) -> str:
        return ""


TEMPLATE = PromptTemplate(user="u", assistant="a", image_separator="")


@pytest.mark.parametrize("processor", [ImageProcessor(336, crop_size=(336, 336)), TilingProcessor(24, 3, ((24, 48),))])
def test_a_record_makes_the_processor_again(processor: ImageProcessor | TilingProcessor) -> None:
    assert from_json(json.loads(json.dumps(processor.to_json()))) == processor


def test_damaged_records_are_refused() -> None:
    with pytest.raises(UserError, match=r"'tilling' is not known.*tiling"):
        from_json({"type": "tilling"})
    with pytest.raises(UserError, match="not known"):
        from_json({"type": "prompt"})
    with pytest.raises(UserError, match="damaged"):
        from_json({"type": "image", "sides": 3})


def test_pictures_are_read_where_their_texts_have_placeholders() -> None:
    pixels = np.zeros((1, 3, 2, 2), np.uint8)
    first, second = Picture((pixels,), "[<image><image>/<image>]"), Picture((pixels,), "<image><image>")
    pieces = read(TEMPLATE, "<image><image>q", [first, second], Words())
    assert pieces == [
        [1, ord("u"), ord("[")],
        View(first, 0, 2, 0),
        [ord("/")],
        View(first, 2, 3, 0),
        [ord("]")],
        View(second, 0, 2, 0),
        [ord("q"), ord("a")],
    ]
    joined = read(TEMPLATE, "q", [second, first], Words())
    assert joined[1] == View(second, 0, 2, 0)
    assert joined[0] == [1, ord("u")]


def test_a_placeholder_that_the_question_writes_itself_is_refused() -> None:
    picture = Picture((np.zeros(1),), "<image><image>")
    with pytest.raises(UserError, match="2 x <image> for 1"):
        read(TEMPLATE, "<image> and <image>", [picture], Words())
