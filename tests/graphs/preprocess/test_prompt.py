"""Prompts: templates, the place of images, and LLaVA's tokenization around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Whole
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace

from graphs.errors import UserError
from graphs.preprocess.prompt import VICUNA_V1, ImageSegment, PromptTemplate, TextSegment, segments, tokenize
from graphs.preprocess.tokenizer import Tokenizer, load_tokenizer
from tests.graphs.preprocess.test_tokenizer import byte_level, declare, pieces

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PLACEHOLDER = -200  # LLaVA's IMAGE_TOKEN_INDEX


def llava(prompt: str, tokenizer: Tokenizer, bos: bool) -> list[int]:
    """What LLaVA's tokenization is defined to give: each piece encoded with the begin token, which all but one lose."""
    begin = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    encoded = [begin + tokenizer.encode(piece) for piece in prompt.split("<image>")]
    ids = encoded[0][:1] if bos else []
    for index, piece in enumerate(encoded):
        ids += [PLACEHOLDER] if index else []
        ids += piece[1:] if bos else piece
    return ids


def flat(tokenized: list[np.ndarray | ImageSegment]) -> list[int]:
    return [i for part in tokenized for i in ([PLACEHOLDER] if isinstance(part, ImageSegment) else part.tolist())]


@pytest.fixture(params=["tokenizer.json", "tokenizer.json without bos", "tokenizer.model"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "tokenizer.model":
        pieces(tmp_path)
    else:
        byte_level(tmp_path)
        declare(tmp_path, tokenizer_config={"bos_token": "<s>", "add_bos_token": request.param == "tokenizer.json"})
    found = load_tokenizer(tmp_path)
    assert found is not None
    return found


def test_the_vicuna_prompt_is_the_one_mobilevlm_was_trained_on() -> None:
    assert VICUNA_V1.render("What is this?", 1) == f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT:"
    assert VICUNA_V1.render("What is this?", 0) == f"{SYSTEM} USER: What is this? ASSISTANT:"


def test_segments_are_cut_at_the_images() -> None:
    assert segments(VICUNA_V1, "Hi", 0) == [TextSegment(f"{SYSTEM} USER: Hi ASSISTANT:")]
    before, after = TextSegment(f"{SYSTEM} USER: "), TextSegment("\nHi ASSISTANT:")
    assert segments(VICUNA_V1, "Hi", 1) == [before, ImageSegment(0), after]
    between = TextSegment("\n")
    assert segments(VICUNA_V1, "Hi", 2) == [before, ImageSegment(0), between, ImageSegment(1), after]


def test_the_user_may_place_the_images() -> None:
    bare = PromptTemplate()
    assert segments(bare, "<image> and <image>?", 2) == [
        ImageSegment(0),
        TextSegment(" and "),
        ImageSegment(1),
        TextSegment("?"),
    ]
    assert segments(bare, "<image><image>", 2) == [ImageSegment(0), ImageSegment(1)]
    assert segments(VICUNA_V1, "Is <image> red?", 1)[2] == TextSegment(" red? ASSISTANT:")


@pytest.mark.parametrize(("prompt", "images"), [("<image>", 0), ("<image>", 2), ("<image> <image>", 1)])
def test_placeholders_must_match_the_images(prompt: str, images: int) -> None:
    with pytest.raises(UserError, match=rf"the prompt has {prompt.count('<image>')} x <image> for {images} image"):
        segments(VICUNA_V1, prompt, images)


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("prompt", ["What colour is the square?", " leading", "naïve 图\n", ""])
@pytest.mark.parametrize("template", [VICUNA_V1, PromptTemplate(), PromptTemplate(user="Q: ", image_separator="")])
def test_ids_are_those_of_llava(template: PromptTemplate, prompt: str, images: int, tokenizer: Tokenizer) -> None:
    tokenized = tokenize(segments(template, prompt, images), tokenizer)
    assert flat(tokenized) == llava(template.render(prompt, images), tokenizer, tokenizer.adds_bos)
    for part in tokenized:
        if not isinstance(part, ImageSegment):
            assert part.dtype == np.int64
            assert part.ndim == 1
            assert part.size


def test_one_begin_token_stands_before_everything(tokenizer: Tokenizer) -> None:
    for prompt in ("red <image> blue", "<image> blue", "<image>"):
        ids = flat(tokenize(segments(PromptTemplate(), prompt, 1), tokenizer))
        assert ids.count(tokenizer.bos_id) == int(tokenizer.adds_bos)  # type: ignore[arg-type]
        if tokenizer.adds_bos:
            assert ids[0] == tokenizer.bos_id


def test_a_placeholder_of_the_vocabulary_is_read_with_what_surrounds_it(tmp_path: Path) -> None:
    """As transformers' processors read it: only the beginning of the whole prompt is the beginning of a text."""
    whole = Whole(WordLevel({"[UNK]": 0, "▁Hi": 1, "▁you": 2, "you": 3}, unk_token="[UNK]"))
    whole.pre_tokenizer = Metaspace(prepend_scheme="first")
    whole.add_special_tokens(["<image>"])
    whole.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    template = PromptTemplate(user="Hi")
    tokenized = tokenize(segments(template, "<image>you", 1), tokenizer)
    expected = whole.encode("Hi<image>you").ids
    image = whole.token_to_id("<image>")
    assert [i for part in tokenized for i in ([image] if isinstance(part, ImageSegment) else part)] == expected
    assert expected == [1, image, 3]
    assert tokenizer.encode("you") == [2]
