"""Text to token ids and back: tokenizer.json through `tokenizers`, or a sentencepiece tokenizer.model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from graphs.config import ConfigReader
from graphs.errors import UserError
from graphs.files import contained, read_optional_json, reason

MAX_BYTES = 256 << 20
MAX_ID = 1 << 31


class Tokenizer(Protocol):
    """Text to ids and back, the same for every kind of tokenizer file.

    `bos_id`: the id of the token that begins a text, None where none is declared; `adds_bos`: whether the checkpoint's
    own tokenizer puts it before every text. `eos_ids`: the ids that end an answer. `vocab_size` counts added tokens.
    """

    bos_id: int | None
    adds_bos: bool
    eos_ids: tuple[int, ...]
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens before or after. Raises: UserError for text that is no Unicode."""
        ...

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary are skipped."""
        ...


class Encloser(Protocol):
    """A tokenizer that knows the special tokens around a whole text; those read from files do."""

    def enclose(self, text: str, length: int) -> list[int]:
        """The ids of `text` with the special tokens that stand around it, the text cut to make `length` at most."""
        ...


def load_tokenizer(directory: Path | str) -> JsonTokenizer | SentencePieceTokenizer | None:
    """The tokenizer in a checkpoint's directory, tokenizer.json before tokenizer.model; None where it has neither.

    Raises: UserError where the file is corrupt, too large, or links outside the directory.
    """
    directory = Path(directory)
    kinds: dict[str, Callable[[Path, Path], JsonTokenizer | SentencePieceTokenizer]] = {
        "tokenizer.json": JsonTokenizer,
        "tokenizer.model": SentencePieceTokenizer,
    }
    for name, kind in kinds.items():
        if (directory / name).exists() or (directory / name).is_symlink():
            path = contained(directory, name)
            if path.stat().st_size > MAX_BYTES:
                raise UserError(f"{path}: more than the {MAX_BYTES} bytes that a tokenizer may have")
            return kind(path, directory)
    return None


class JsonTokenizer:
    """A tokenizer.json, by Hugging Face's `tokenizers`."""

    def __init__(self, path: Path, directory: Path) -> None:
        """Raises: UserError where the file is not a tokenizer."""
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer: {reason(error)}") from error
        # The file may ask for both; a prompt is neither padded nor cut behind its author's back.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.eos_ids, declared = _specials(directory, self._tokenizer.token_to_id, self.vocab_size)
        first = self._tokenizer.encode("a", add_special_tokens=True).ids[:1]
        self.adds_bos: bool = self.bos_id is not None and (first == [self.bos_id] if declared is None else declared)

    def enclose(self, text: str, length: int) -> list[int]:
        self._tokenizer.enable_truncation(length)
        try:
            return list(self._tokenizer.encode(_unicode(text), add_special_tokens=True).ids)
        finally:
            self._tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(_unicode(text), add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=skip_special))


class SentencePieceTokenizer:
    """A sentencepiece model, the only tokenizer that the published MobileVLM checkpoints carry."""

    def __init__(self, path: Path, directory: Path) -> None:
        """Raises: UserError where the file is not a sentencepiece model."""
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(f"{path}: reading it needs sentencepiece: pip install sentencepiece") from error
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a sentencepiece model: {reason(error)}") from error
        self.vocab_size: int = self._processor.get_piece_size()
        bos, eos, declared = _specials(directory, self._token_id, self.vocab_size)
        own_bos, own_eos = self._processor.bos_id(), self._processor.eos_id()  # -1 where there is none
        self.bos_id: int | None = own_bos if bos is None and own_bos >= 0 else bos
        self.eos_ids: tuple[int, ...] = eos or ((own_eos,) if own_eos >= 0 else ())
        # Only the LLaMA family publishes such models, and its tokenizer begins every text unless told otherwise.
        self.adds_bos: bool = self.bos_id is not None and declared is not False

    def enclose(self, text: str, length: int) -> list[int]:
        begin = [self.bos_id] if self.adds_bos and self.bos_id is not None else []
        return [*begin, *self.encode(text)][:length]

    def _token_id(self, token: str) -> int | None:
        index = int(self._processor.piece_to_id(token))
        return index if self._processor.id_to_piece(index) == token else None

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(_unicode(text)))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return "".join(self._runs(known, skip_special))

    def _runs(self, ids: Sequence[int], skip_special: bool) -> Iterator[str]:
        """Decoded runs of text; control tokens are dropped before they are joined, or kept as runs of their own."""

        def special(index: int) -> bool:
            return bool(self._processor.is_control(index) or self._processor.is_unknown(index))

        if skip_special:
            yield str(self._processor.decode([i for i in ids if not special(i)]))
            return
        for is_special, run in groupby(ids, key=special):
            members = list(run)
            yield "".join(map(self._processor.id_to_piece, members)) if is_special else self._processor.decode(members)


def _unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid Unicode at character {error.start + 1}") from error
    return text


def _specials(
    directory: Path, token_id: Callable[[str], int | None], vocab_size: int
) -> tuple[int | None, tuple[int, ...], bool | None]:
    """(bos id, eos ids, whether bos is put before a text) as the checkpoint's JSON files declare them, None if not.

    An answer ends where generation_config.json says, as in transformers' `generate`; config.json and
    tokenizer_config.json stand in for it. A text begins with what tokenizer_config.json names.
    """
    names = ("tokenizer_config.json", "config.json", "generation_config.json")
    tokenizer, config, generation = (ConfigReader(read_optional_json(directory, name), name) for name in names)
    texts = (config, config.section("text_config"))

    def named(key: str) -> tuple[int, ...]:
        value: Any = tokenizer.values.get(key)
        token = value.get("content") if isinstance(value, dict) else value
        found = token_id(token) if isinstance(token, str) else None
        return () if found is None else (found,)

    def numbered(key: str, *readers: ConfigReader, high: int = vocab_size - 1) -> tuple[int, ...]:
        for reader in readers:
            if key in reader:
                value = reader.values[key]
                ids = value if isinstance(value, list) else [value]
                return tuple(ConfigReader({key: i}, reader.where).int(key, low=0, high=high) for i in ids)
        return ()

    # A model may begin with an id beyond its tokenizer's, as BLIP's decoder does.
    bos = named("bos_token") or numbered("bos_token_id", *texts, generation, high=MAX_ID)
    eos = numbered("eos_token_id", generation, *texts) or named("eos_token")
    adds_bos = tokenizer.bool("add_bos_token") if "add_bos_token" in tokenizer else None
    return (bos[0] if bos else None), eos, adds_bos
