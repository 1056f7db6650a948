"""Prompts to segments of text and images, and those to token ids.

A template is data. Segmentation and tokenization are LLaVA's (`tokenizer_image_token` in
https://github.com/haotian-liu/LLaVA, shared by MobileVLM): the prompt is cut at its image placeholders, every piece of
text is tokenized by itself without special tokens, and one token that begins the text stands before everything. Where
the placeholder is a token of the vocabulary, the prompt is tokenized whole and cut at that token, as transformers'
processors do: the two differ in tokenizers that treat the beginning of a text apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphs.errors import UserError
from graphs.files import shown
from graphs.preprocess.picture import Picture, View
from graphs.preprocess.tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptTemplate:
    """One turn of a conversation, as text: `system`, `user`, the images and the question, then `assistant`."""

    system: str = ""
    user: str = ""
    assistant: str = ""
    image: str = "<image>"
    image_separator: str = "\n"  # after each image that the question does not place itself
    question: str = ""  # before the question, behind the last image
    begin: bool = True  # whether the tokenizer's token that begins a text stands before everything, if it adds one
    start: tuple[int, ...] = ()  # ids that what is decoded begins with: the answer, where an encoder reads the prompt
    stop: tuple[int, ...] = ()  # ids that end an answer, where they are others than the tokenizer's files declare
    images_first: bool = False  # pictures that lead stand before the token that begins a text
    tasks: tuple[tuple[str, str], ...] = ()  # a token of a question, and what is asked for it and the rest, `{input}`
    user_text: str = ""  # instead of `user` where no image follows it, if that differs
    label: str = ""  # instead of a placeholder: `{image}` is that, `{index}` its number from 0, `{number}` from 1
    around: str = ""  # word around a picture's text: shared by neighbours, a blank behind it before another word

    def render(self, prompt: str, images: int) -> str:
        """The whole prompt, with one placeholder an image.

        Images stand before the question, unless it holds exactly as many placeholders as there are images: then they
        stand there. Raises: UserError where it holds another number of them.
        """
        placed = prompt.count(self.image)
        if placed not in (0, images):
            raise UserError(f"the prompt has {placed} x {self.image} for {images} image(s); write {images} or none")
        before = "" if placed else (self.image + self.image_separator) * images
        asked = f"{before}{self.tasked(prompt)}"
        user = self.user if asked.startswith(self.image) else self.user_text or self.user
        head, mark, tail = asked.rpartition(self.image)
        return self.labelled(f"{self.system}{user}{head}{mark}{self.question}{tail}{self.assistant}")

    def tasked(self, prompt: str) -> str:
        """What is asked for the first of `tasks` that the prompt names; the prompt itself where it names none.

        Raises: UserError where the prompt says more than that task takes.
        """
        token, question = next((task for task in self.tasks if task[0] in prompt), ("", ""))
        if not token:
            return prompt
        rest = prompt.replace(token, "").strip()
        if rest and "{input}" not in question:
            raise UserError(f"{token} is all that such a prompt may say; it has '{shown(rest, 40)}' besides")
        return question.replace("{input}", rest)

    def labelled(self, text: str) -> str:
        """`text` with every placeholder in its label, where there are such."""
        if not self.label:
            return text
        head, *rest = text.split(self.image)
        for index, after in enumerate(rest):  # not str.format, whose fields reach further: manifests are untrusted
            numbered = self.label.replace("{index}", str(index)).replace("{number}", str(index + 1))
            head += numbered.replace("{image}", self.image) + after
        return head


#: one turn as llava-hf's processors write it, without a system's words
USER_ASSISTANT = PromptTemplate(user="USER: ", assistant=" ASSISTANT:")

#: the conversation that MobileVLM, LLaVA 1.5 and others of Vicuna's descent were trained on
VICUNA_V1 = PromptTemplate(
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    user="USER: ",
    assistant=" ASSISTANT:",
)


@dataclass(frozen=True)
class TextSegment:
    """A piece of the prompt's text; never empty."""

    text: str


@dataclass(frozen=True)
class ImageSegment:
    """The place of image number `index`, counted from 0; `placeholder` is how the prompt's text shows it."""

    index: int
    placeholder: str = "<image>"


Segment = TextSegment | ImageSegment

#: one stretch of a tokenized prompt
Piece = list[int] | View


def segments(template: PromptTemplate, prompt: str, images: int) -> list[Segment]:
    """The prompt in order, cut at its images. Raises: UserError as `PromptTemplate.render`."""
    found: list[Segment] = []
    for index, text in enumerate(template.render(prompt, images).split(template.image)):
        if index:
            found.append(ImageSegment(index - 1, template.image))
        if text:
            found.append(TextSegment(text))
    return found


def tokenize(
    pieces: Sequence[Segment], tokenizer: Tokenizer, images_first: bool = False, begins: bool = True
) -> list[NDArray[np.int64] | ImageSegment]:
    """The segments with ids for text: int64 [T] arrays, T > 0, and image segments as they are.

    Where the tokenizer adds a token that begins a text, it stands once, before everything; with `images_first` behind
    the pictures that lead, whose text begins anew there and is tokenized by itself; unless `begins` is false.
    """
    begin = [tokenizer.bos_id] if begins and tokenizer.adds_bos and tokenizer.bos_id is not None else []
    parts = (not images_first and _whole(pieces, tokenizer)) or [
        piece if isinstance(piece, ImageSegment) else tokenizer.encode(piece.text) for piece in pieces
    ]
    lead = next((i for i, part in enumerate(parts) if not isinstance(part, ImageSegment)), len(parts))
    place = lead if images_first else 0
    if place < len(parts) and not isinstance(text := parts[place], ImageSegment):
        parts[place] = begin + text
    elif begin:
        parts.insert(place, begin)
    return [
        part if isinstance(part, ImageSegment) else np.array(part, dtype=np.int64)
        for part in parts
        if isinstance(part, ImageSegment) or part
    ]


def _whole(pieces: Sequence[Segment], tokenizer: Tokenizer) -> list[list[int] | ImageSegment]:
    """Ids of the whole prompt, cut at the images; empty where their placeholder is no token that marks just them."""
    images = [piece for piece in pieces if isinstance(piece, ImageSegment)]
    marks = {tuple(tokenizer.encode(image.placeholder)) for image in images}
    if len(marks) != 1 or len(mark := marks.pop()) != 1:
        return []
    ids = tokenizer.encode("".join(p.placeholder if isinstance(p, ImageSegment) else p.text for p in pieces))
    places = [place for place, token in enumerate(ids) if token == mark[0]]
    if len(places) != len(images):
        return []
    parts: list[list[int] | ImageSegment] = []
    start = 0
    for image, place in zip(images, places, strict=True):
        parts += [ids[start:place], image]
        start = place + 1
    return [*parts, ids[start:]]


def read(template: PromptTemplate, prompt: str, pictures: Sequence[Picture], tokenizer: Tokenizer) -> list[Piece]:
    """The prompt as ids and the places of pictures, in order.

    Pictures with a text of their own are written out in the prompt, which is tokenized whole, but with `images_first`
    for pictures that lead; each token that is the template's placeholder then stands for the next embedding. Raises:
    UserError as `PromptTemplate.render`, and where the tokenizer does not know the placeholder that such a text needs.
    """
    if not any(picture.text for picture in pictures):
        parts = tokenize(segments(template, prompt, len(pictures)), tokenizer, template.images_first, template.begin)
        return [View(pictures[p.index]) if isinstance(p, ImageSegment) else p.tolist() for p in parts]
    texts = [picture.text for picture in pictures]
    head, *rest = template.render(prompt, len(pictures)).split(template.image)
    whole = head + "".join(text + after for text, after in zip(texts, rest, strict=True))
    if word := template.around:
        whole = re.sub(re.escape(word) + r"(?=[^\s<])", f"{word} ", whole.replace(word * 2, word))
    twice = tokenizer.encode(template.image * 2)  # so that a space that is put before a text is told from the token
    mark = twice[-1] if twice[-2:-1] == twice[-1:] else None
    begin = [tokenizer.bos_id] if template.begin and tokenizer.adds_bos and tokenizer.bos_id is not None else []
    leading = "".join(texts[: 1 + next((i for i, after in enumerate(rest) if after), len(rest))])
    if template.images_first and mark is not None and not head and whole.startswith(leading):
        pictured = tokenizer.encode(leading)
        ids = [*pictured[pictured.index(mark) :], *begin, *tokenizer.encode(whole.removeprefix(leading))]
    else:
        ids = [*begin, *tokenizer.encode(whole)]
    wanted = [picture.text.count(template.image) for picture in pictures]
    if mark is None or ids.count(mark) != sum(wanted):
        raise UserError(f"the tokenizer has no token of its own for {template.image}, where pictures are read")
    return placed(ids, mark, pictures, wanted)


def placed(ids: Sequence[int], mark: int, pictures: Sequence[Picture], counts: Sequence[int]) -> list[Piece]:
    """Ids with every run of `mark` exchanged for views: the next embeddings of picture after picture, `counts` each."""
    found: list[Piece] = []
    order = iter((index, row) for index, count in enumerate(counts) for row in range(count))
    for token in ids:
        last = found[-1] if found else None
        if token != mark:
            if isinstance(last, list):
                last.append(token)
            else:
                found.append([token])
            continue
        index, row = next(order)
        if isinstance(last, View) and last.picture is pictures[index] and row:
            found[-1] = View(last.picture, last.start, row + 1, mark)
        else:
            found.append(View(pictures[index], row, row + 1, mark))
    return found
