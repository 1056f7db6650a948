"""What dual encoders share: pictures and texts to vectors of one space, and the scores of one against the other.

Shape suffixes: I pictures, X texts, P width of the shared space.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graphs.components.text.clip import ClipTextConfig, ClipTextTower
from graphs.components.vision.clip import ClipVisionConfig, ClipVisionTower
from graphs.components.vision.pixels import NormalizePixels
from graphs.preprocess.image import ImageProcessor
from graphs.spec import Architecture, Dim, Method, TensorSpec

#: the most pictures or texts that are scored at once
MAX_SCORED = 1024


class PictureTower(Protocol):
    """What must be known of a picture tower's configuration."""

    @property
    def image_size(self) -> int: ...


class WordTower(Protocol):
    """What must be known of a text tower's configuration."""

    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def pad_token_id(self) -> int: ...
    @property
    def projection_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


class ImageEncoder(nn.Module):
    """Raw pixels [1, 3, H, W] uint8 to a picture's embedding [1, P], not normalised."""

    def __init__(self, pixels: ImageProcessor, tower: nn.Module, pool: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.normalize = NormalizePixels(pixels.image_mean, pixels.image_std, pixels.rescale_factor)
        self.tower = tower
        self.pool = pool
        self.projection = projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(self.pool(self.tower(self.normalize(pixel_values))))


class Similarity(nn.Module):
    """Embeddings [I, P] and [X, P] to logits [I, X]: exp(scale) times the cosine, and a bias where there is one.

    `most`: a bound on exp(scale), which then is at least 1 too; None where there is none.
    """

    def __init__(self, shape: tuple[int, ...], bias: bool, most: float | None = None) -> None:
        super().__init__()
        self.limit = None if most is None else math.log(most)
        self.logit_scale = nn.Parameter(torch.zeros(shape))
        self.logit_bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        image_IP, text_XP = unit(image_embeds), unit(text_embeds)
        scale = self.logit_scale if self.limit is None else self.logit_scale.clamp(0.0, self.limit)
        logits_IX = image_IP @ text_XP.transpose(0, 1) * scale.exp()
        return logits_IX if self.logit_bias is None else logits_IX + self.logit_bias


def unit(x: Tensor) -> Tensor:
    """Rows divided by their length."""
    return x / x.square().sum(dim=-1, keepdim=True).sqrt()


class DualEncoder(Architecture):
    """An architecture of `image_encoder`, `text_encoder` and `similarity`.

    Subclasses are frozen dataclasses with these fields; they say how pictures are pooled, and where weights are.
    """

    kind = "dual_encoder"

    vision: PictureTower
    text: WordTower
    processor: ImageProcessor | None

    @property
    def pixels(self) -> ImageProcessor:
        """The pictures' processor, the checkpoint's own or the system's."""
        raise TypeError(f"{type(self).__name__} must say how pictures are prepared")

    def towers(self) -> tuple[nn.Module, nn.Module]:
        """The towers of pictures and of texts: CLIP's, unless a system has others."""
        assert isinstance(self.vision, ClipVisionConfig)
        assert isinstance(self.text, ClipTextConfig)
        return ClipVisionTower(self.vision, select_layer=-1, drop_first=False), ClipTextTower(self.text)

    def head(self) -> tuple[nn.Module, nn.Module]:
        """Pool and projection behind the picture tower."""
        raise TypeError(f"{type(self).__name__} must build its picture head")

    def similarity(self) -> Similarity:
        """The scoring module."""
        raise TypeError(f"{type(self).__name__} must build its scores")

    @property
    def image_processor(self) -> ImageProcessor:
        return self.pixels

    def facts(self) -> dict[str, Any]:
        return {
            "image_size": self.vision.image_size,
            "text_length": self.text.max_position_embeddings,
            "pad_id": self.text.pad_token_id,
            "embedding_size": self.text.projection_dim,
            "vocab_size": self.text.vocab_size,
        }

    def build(self) -> nn.Module:
        root = nn.Module()
        pictures, root.text_encoder = self.towers()
        root.image_encoder = ImageEncoder(self.pixels, pictures, *self.head())
        root.similarity = self.similarity()
        return root

    def methods(self, root: nn.Module) -> tuple[Method, ...]:
        side, width = self.vision.image_size, self.text.projection_dim
        pixels = TensorSpec("pixel_values", (1, 3, side, side), torch.uint8, "pixels")
        length = self.text.max_position_embeddings
        ids = TensorSpec("input_ids", (1, length), torch.int64, "ids", self.text.vocab_size)
        image, text = (TensorSpec(f"{name}_embeds", (1, width)) for name in ("image", "text"))
        images, texts = Dim("images", 1, MAX_SCORED), Dim("texts", 1, MAX_SCORED)
        scored = TensorSpec("image_embeds", (images, width)), TensorSpec("text_embeds", (texts, width))
        return (
            Method("image_encoder", root.get_submodule("image_encoder"), (pixels,), (image,)),
            Method("text_encoder", root.get_submodule("text_encoder"), (ids,), (text,)),
            Method(
                "similarity",
                root.get_submodule("similarity"),
                scored,
                (TensorSpec("logits_per_image", (images, texts)),),
            ),
        )
