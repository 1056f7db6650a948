"""Tokenizers of both kinds behind one interface, compared with the libraries that define them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers

from graphs.errors import UserError
from graphs.preprocess.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "What colour is the circle?",
    "two  red squares",
    " 12 + 7",
    "naïve café 图片 🙂",
    "",
    "\n",
    "a\nb\n",
    "USER: hi",
]
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "What colour is the square? How many circles are there? Read the word.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "red green blue one two three four five six seven eight nine ten left right above below",
] * 20


def byte_level(directory: Path) -> tokenizers.Tokenizer:
    """A byte-level BPE with <s> and </s>, written as tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def pieces(directory: Path) -> sentencepiece.SentencePieceProcessor:
    """A BPE sentencepiece model with byte fallback, as LLaMA's, written as tokenizer.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def declare(directory: Path, **files: dict[str, Any]) -> None:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def loaded(directory: Path) -> Tokenizer:
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_json_encodes_and_decodes(tmp_path: Path, text: str) -> None:
    library = byte_level(tmp_path)
    tokenizer = loaded(tmp_path)
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == library.get_vocab_size()


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_encodes_and_decodes(tmp_path: Path, text: str) -> None:
    library = pieces(tmp_path)
    tokenizer = loaded(tmp_path)
    assert tokenizer.encode(text) == library.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 400
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (2,), True)


@pytest.mark.parametrize("text", [text for text in TEXTS if text.strip(" ") == text != ""])
def test_sentencepiece_equals_the_llama_tokenizer(tmp_path: Path, text: str) -> None:
    """Its conversion of the model in transformers 5 differs only for leading spaces, of which it drops one."""
    pieces(tmp_path)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    assert loaded(tmp_path).encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_special_tokens_are_kept_or_dropped_on_request(tmp_path: Path) -> None:
    byte_level(tmp_path)
    for make in (byte_level, pieces):
        for old in tmp_path.iterdir():
            old.unlink()
        make(tmp_path)
        tokenizer = loaded(tmp_path)
        words = tokenizer.encode("red square")
        begin, end = (0, 1) if make is byte_level else (1, 2)
        assert begin not in words
        assert tokenizer.decode([begin, *words, end, 10_000, -1]) == "red square"
        assert tokenizer.decode([begin, *words, end], skip_special=False) == "<s>red square</s>"


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character(tmp_path: Path) -> None:
    library = byte_level(tmp_path)
    tokenizer = loaded(tmp_path)
    first_byte = library.encode("图").ids[:1]
    assert tokenizer.decode(first_byte) == "\ufffd"


def test_padding_and_truncation_in_the_file_do_not_apply(tmp_path: Path) -> None:
    library = byte_level(tmp_path)
    ids = library.encode("red").ids
    library.enable_truncation(1)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "tokenizer.json"))
    assert loaded(tmp_path).encode("red") == ids
    assert len(loaded(tmp_path).encode("red green blue yellow")) > 1


def test_tokenizer_json_comes_before_tokenizer_model(tmp_path: Path) -> None:
    pieces(tmp_path)
    library = byte_level(tmp_path)
    assert loaded(tmp_path).encode("red") == library.encode("red").ids


def test_neither_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "bos", "eos", "adds"),
    [
        ({}, None, (), False),
        ({"config": {"bos_token_id": 0, "eos_token_id": 1}}, 0, (1,), False),
        ({"config": {"text_config": {"bos_token_id": 0, "eos_token_id": 1}}}, 0, (1,), False),
        ({"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": [1, 7]}}, None, (1, 7), False),
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, 0, (1,), False),
        ({"tokenizer_config": {"bos_token": "<s>", "add_bos_token": True}}, 0, (), True),
        ({"tokenizer_config": {"add_bos_token": True}, "config": {"bos_token_id": 0}}, 0, (), True),
        ({"tokenizer_config": {"add_bos_token": True}}, None, (), False),
        ({"tokenizer_config": {"bos_token": "<absent>"}, "config": {"bos_token_id": 5}}, 5, (), False),
    ],
)
def test_the_ends_of_a_text_are_where_the_files_say(
    tmp_path: Path, files: dict[str, Any], bos: int | None, eos: tuple[int, ...], adds: bool
) -> None:
    byte_level(tmp_path)
    declare(tmp_path, **files)
    tokenizer = loaded(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (bos, eos, adds)


@pytest.mark.parametrize("adds", [True, False])
def test_a_template_in_tokenizer_json_decides_as_in_transformers(tmp_path: Path, adds: bool) -> None:
    library = byte_level(tmp_path)
    if adds:
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
        library.save(str(tmp_path / "tokenizer.json"))
    declare(tmp_path, tokenizer_config={"bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"})
    tokenizer = loaded(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.adds_bos is adds
    assert [0] * adds + tokenizer.encode("red square") == theirs("red square").input_ids


@pytest.mark.parametrize(("declared", "adds"), [({}, True), ({"add_bos_token": False}, False)])
def test_sentencepiece_begins_a_text_unless_told_otherwise(
    tmp_path: Path, declared: dict[str, Any], adds: bool
) -> None:
    pieces(tmp_path)
    declare(tmp_path, tokenizer_config=declared)
    assert loaded(tmp_path).adds_bos is adds


@pytest.mark.parametrize("value", [-1, 400, 1 << 40, "2", True, [1, -2]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, value: object) -> None:
    byte_level(tmp_path)
    declare(tmp_path, config={"eos_token_id": value})
    with pytest.raises(UserError, match=r"config.json: eos_token_id is .* an integer from 0 to 3"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00garbage", b'{"model": {"type": "BPE"}}'])
def test_corrupt_files_are_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    byte_level(tmp_path)
    (tmp_path / "checkpoint" / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="points outside its directory"):
        load_tokenizer(tmp_path / "checkpoint")


def test_text_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    for make in (byte_level, pieces):
        make(tmp_path)
        with pytest.raises(UserError, match="not valid Unicode at character 4"):
            loaded(tmp_path).encode("abc\udcff")
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)
