"""Texts read with a picture, or compared with it: the methods of BLIP (Li et al., arXiv 2201.12086) around its BERT.

Shape suffixes: S tokens, M states of the picture, D width, A heads, K head width, L layers, I pictures, X texts,
P width of the shared space.
"""

from __future__ import annotations

from torch import Tensor, nn

from graphs.components.dual import unit
from graphs.components.image_text import VisionEncoder
from graphs.components.text.bert import BertConfig
from graphs.components.text.cross import CrossCaches, Pair
from graphs.components.text.med import GroundedEncoder, MedEncoder


class QuestionEncoder(nn.Module):
    """Ids [1, S] (int64) and a picture's keys and values to those of the question, [L, A, S, K] each."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.grounded = GroundedEncoder(config, MedEncoder(config))
        self.cross = cross_caches(config, config.hidden_size)

    def forward(self, input_ids: Tensor, image_keys: Tensor, image_values: Tensor) -> Pair:
        pair: Pair = self.cross(self.grounded(input_ids, image_keys, image_values))
        return pair


class ImageEncoder(nn.Module):
    """Raw pixels [1, 3, H, W] uint8 to an embedding [1, P], not normalised, and keys and values [L, A, M, K]."""

    def __init__(self, plain: VisionEncoder, width: int, shared: int) -> None:
        super().__init__()
        self.normalize, self.tower, self.cross = plain.normalize, plain.tower, plain.projector
        self.projection = nn.Linear(width, shared)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states_1MD = self.tower(self.normalize(pixel_values))
        return self.projection(states_1MD[:, 0]), *self.cross(states_1MD)


class TextEncoder(nn.Module):
    """Ids [1, S] (int64) to an embedding [1, P], not normalised."""

    def __init__(self, text: MedEncoder, width: int, shared: int) -> None:
        super().__init__()
        self.text = text
        self.projection = nn.Linear(width, shared)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.projection(self.text(input_ids)[:, 0])


class Matching(nn.Module):
    """Ids [1, S] (int64) and a picture's keys and values to logits [1, 2]: they do not match, they do."""

    def __init__(self, config: BertConfig, text: MedEncoder) -> None:
        super().__init__()
        self.grounded = GroundedEncoder(config, text)
        self.head = nn.Linear(config.hidden_size, 2)

    def forward(self, input_ids: Tensor, cross_keys: Tensor, cross_values: Tensor) -> Tensor:
        return self.head(self.grounded(input_ids, cross_keys, cross_values)[:, 0])


class Cosines(nn.Module):
    """Embeddings [I, P] and [X, P] to the cosines [I, X]."""

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        return unit(image_embeds) @ unit(text_embeds).transpose(0, 1)


def cross_caches(config: BertConfig, width: int) -> CrossCaches:
    """What makes the keys and values that all layers of `config` read of states of `width`."""
    return CrossCaches(config.num_hidden_layers, width, config.num_attention_heads, config.head_width)
