"""Scenes to batches of tensors: all questions of a picture in one sequence that share its prompt and image.

A sequence is  [<s> system USER:] [image] [question answer </s>] [question answer </s>] ...  Each question sees the
shared prefix and itself, and its positions go on from the end of the prefix, so that it computes what it would alone.

Shape suffixes: B pictures, P patches, T tokens after the image, S all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from zoo import drawing
from zoo.questions import ask
from zoo.scenes import Scene
from zoo.tokens import AFTER, BEFORE, BEGIN, END

IGNORED = -100
MASKED = -30000.0
#: what a patch may show, for the auxiliary loss: nothing, a shape, a capital or a digit
NAMES = ("", *drawing.SHAPES, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"0123456789")
COLORS = ("", *drawing.COLORS)
#: shares of the visual tokens that a shortened prefix keeps
KEPT = (0.25, 0.375, 0.5, 0.5, 0.625, 0.75)


@dataclass(frozen=True)
class Batch:
    """Pictures and their packed questions."""

    pixels: Tensor  # uint8 [B, 3, H, W]
    ids: Tensor  # int64 [B, T]
    positions: Tensor  # int64 [B, T], counted from the end of the prefix
    segments: Tensor  # int64 [B, T], number of the question; -1 is padding
    targets: Tensor  # int64 [B, T], the next token where it belongs to an answer, else IGNORED
    names: Tensor  # int64 [B, P], index in NAMES of what each patch shows
    colors: Tensor  # int64 [B, P], index in COLORS
    token_names: Tensor  # int64 [B, P / 4], the same for visual tokens, each of 2 x 2 patches
    token_colors: Tensor  # int64 [B, P / 4]
    shortening: Tensor | None = None  # float32 [B, K, P / 4]: K tokens as means of the visual tokens; None keeps all


class Encoder:
    """The tokenizer with the template's pieces: the one place that decides how a prompt is cut."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.begin, self.end = (int(tokenizer.token_to_id(token) or 0) for token in (BEGIN, END))
        self.before = [self.begin, *self._ids(BEFORE)]

    def question(self, question: str) -> list[int]:
        """Tokens after the image, up to where the answer begins."""
        return self._ids(AFTER.format(question=question))

    def answer(self, answer: str) -> list[int]:
        """The answer's tokens with the end token."""
        return [*self._ids(f" {answer}"), self.end]

    def decode(self, ids: Sequence[int]) -> str:
        """The answer that greedy tokens spell, up to the end token."""
        kept = list(ids)
        kept = kept[: kept.index(self.end)] if self.end in kept else kept
        return str(self.tokenizer.decode(kept)).strip()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def thin(scene: Scene, limit: int, rng: np.random.Generator) -> Scene:
    """The scene with at most `limit` of its questions in random order; one about reading is always kept."""
    order = rng.permutation(len(scene.questions))
    questions = sorted((scene.questions[n] for n in order), key=lambda q: q[0] not in ("digits", "words"))
    return replace(scene, questions=tuple(questions[:limit]))


def drill(scene: Scene, limit: int, rng: np.random.Generator, first: str = "") -> Scene:
    """The scene with up to `limit` questions, most of them about one shape or a group: as many as its things allow.

    Several of a kind about one picture teach that the question decides. Reading stays in half of the scenes, the
    caption in a third. Those of the task `first` come before others.
    """
    reading = [q for q in scene.questions if q[0] in ("digits", "words")]
    things = [mark.thing for mark in scene.marks if mark.name in drawing.SHAPES]
    found = dict.fromkeys(q for _ in range(5) for q in ask(rng, things, "none", ""))
    kept = reading if rng.random() < 0.5 else []
    kept = kept + [q for q in found if q[0] == "caption" and rng.random() < 0.33]
    others = [q for q in found if q[0] != "caption"]
    order = sorted(rng.permutation(len(others)), key=lambda n: others[n][0] != first)[: limit - len(kept)]
    return replace(scene, questions=tuple(kept + [others[n] for n in order]))


def pack(scenes: Sequence[Scene], encoder: Encoder, patch: int) -> Batch:
    """One batch of all questions of `scenes`; `patch` is the side in pixels of the vision tower's patches."""
    rows = [_row(scene, encoder) for scene in scenes]
    longest = max(len(row["ids"]) for row in rows)
    fill = {"ids": encoder.end, "positions": 0, "segments": -1, "targets": IGNORED}
    columns = {
        key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])
        for key, value in fill.items()
    }
    patches, tokens = ([_patches(scene, side) for scene in scenes] for side in (patch, 2 * patch))
    return Batch(
        pixels=torch.stack([pixels(scene.image) for scene in scenes]),
        names=torch.from_numpy(np.stack([names for names, _ in patches])),
        colors=torch.from_numpy(np.stack([colors for _, colors in patches])),
        token_names=torch.from_numpy(np.stack([names for names, _ in tokens])),
        token_colors=torch.from_numpy(np.stack([colors for _, colors in tokens])),
        **columns,
    )


def shortening(batch: Batch, rng: np.random.Generator, share: float) -> Tensor | None:
    """What the decoder gets instead of all visual tokens: [B, K, P / 4]; None for all of them, but in `share` of cases.

    Mostly K tokens at random, those that show something at an advantage, so that the decoder learns to answer from
    fewer of them while none learns to speak for its neighbours; sometimes the means of 2 x 2 tokens.
    """
    pictures, count = batch.token_names.shape
    if rng.random() < 1 - share:
        return None
    if rng.random() < 0.15:
        place = torch.arange(count).view(math.isqrt(count), -1)
        block = (place // len(place) // 2) * (len(place) // 2) + place % len(place) // 2
        return (block.flatten() == torch.arange(count // 4)[:, None]).float().expand(pictures, -1, -1) / 4
    keep = int(rng.choice(KEPT) * count)
    advantage = rng.uniform(0.5, 1.0) * (batch.token_names != 0)
    score = torch.from_numpy(rng.random((pictures, count))) + advantage
    return functional.one_hot(score.topk(keep).indices.sort().values, count).float()


def pixels(image: Image.Image) -> Tensor:
    """uint8 [3, H, W] of an RGB picture."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def mask(segments: Tensor, prefix: int) -> Tensor:
    """[B, 1, S, S] to add to attention scores: causal, and no question sees another."""
    number = torch.cat([segments.new_full((len(segments), prefix), -2), segments], dim=1)
    causal = torch.ones(number.shape[1], number.shape[1], dtype=torch.bool).tril()
    same = (number[:, :, None] == number[:, None, :]) | (number == -2)[:, None, :]
    return torch.where(causal & same, 0.0, MASKED)[:, None]


def _row(scene: Scene, encoder: Encoder) -> dict[str, list[int]]:
    row: dict[str, list[int]] = {"ids": [], "positions": [], "segments": [], "targets": []}
    for number, (_, question, answer) in enumerate(scene.questions):
        asked, answered = encoder.question(question), encoder.answer(answer)
        ids = asked + answered[:-1]
        row["ids"] += ids
        row["positions"] += range(len(ids))
        row["segments"] += [number] * len(ids)
        row["targets"] += [IGNORED] * (len(asked) - 1) + answered
    return row


def _patches(scene: Scene, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """What lies under the middle of each patch: int64 [P] names and colours, in row order."""
    side = drawing.SIZE // patch
    names, colors = np.zeros((side, side), np.int64), np.zeros((side, side), np.int64)
    for mark in scene.marks:
        left, top, right, bottom = (int(np.ceil(edge / patch - 0.5)) for edge in mark.box)
        window = (slice(max(top, 0), bottom), slice(max(left, 0), right))
        names[window], colors[window] = NAMES.index(mark.name), COLORS.index(mark.color)
    return names.reshape(-1), colors.reshape(-1)
