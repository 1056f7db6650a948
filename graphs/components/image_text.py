"""What image-text decoders share: three methods, of which `vision_encoder` holds everything up to the embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphs.components.text.cache import caches
from graphs.components.text.config import TextConfig
from graphs.components.text.decoder import TextDecoder, TokenEmbedding
from graphs.components.vision.pixels import NormalizePixels
from graphs.preprocess.picture import Normalized
from graphs.spec import Architecture, Dim, Method, TensorSpec

#: the longest context a bundle keeps a cache for, unless the checkpoint's is shorter
MAX_CONTEXT = 2048


class VisionEncoder(nn.Module):
    """Raw pixels [1, 3, H, W] uint8 to image embeddings [1, M, D]: normalisation, tower, projector."""

    def __init__(self, pixels: Normalized, tower: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.normalize = NormalizePixels(pixels.image_mean, pixels.image_std, pixels.rescale_factor)
        self.tower = tower
        self.projector = projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projector(self.tower(self.normalize(pixel_values)))


class ImageTextDecoder(Architecture):
    """An architecture of `vision_encoder`, `token_embedding` and `text_decoder`, the last over a cache of its own.

    Subclasses are frozen dataclasses with these fields; they say what a picture becomes and build the encoder.
    """

    kind = "vlm_decoder"

    text: TextConfig
    max_context: int

    @property
    def image_size(self) -> int:
        """Side of the square picture that the encoder takes, in pixels."""
        raise TypeError(f"{type(self).__name__} must say what its pictures are")

    @property
    def visual_tokens(self) -> int:
        """Image embeddings that one picture becomes."""
        raise TypeError(f"{type(self).__name__} must say what a picture becomes")

    def encoder(self) -> nn.Module:
        """The module behind `vision_encoder`."""
        raise TypeError(f"{type(self).__name__} must build its vision encoder")

    @property
    def context(self) -> int:
        """Tokens that the deployed decoder's cache holds."""
        return min(self.text.max_position_embeddings, self.max_context)

    def with_context(self, max_context: int) -> Self:
        bounded: Any = self  # a frozen dataclass with that field, as every subclass is
        return replace(bounded, max_context=max_context)

    def facts(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "visual_tokens": self.visual_tokens,
            "image_size": self.image_size,
            "layers": self.text.num_hidden_layers,
            "vocab_size": self.text.vocab_size,
        }

    def decoder(self) -> nn.Module:
        """The module behind `text_decoder`; its caches are `KVCache`s."""
        return TextDecoder(self.text, self.context)

    def embedding(self) -> nn.Module:
        """The module behind `token_embedding`."""
        return TokenEmbedding(self.text)

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        """What `vision_encoder` takes."""
        return (TensorSpec("pixel_values", (1, 3, self.image_size, self.image_size), torch.uint8, "pixels"),)

    def image_embeds(self) -> TensorSpec:
        """What `vision_encoder` gives."""
        return TensorSpec("image_embeds", (1, self.visual_tokens, self.text.hidden_size))

    def build(self) -> nn.Module:
        root = nn.Module()
        root.vision_encoder = self.encoder()
        root.token_embedding = self.embedding()
        root.text_decoder = self.decoder()
        return root

    def methods(self, root: nn.Module) -> tuple[Method, ...]:
        text, decoder = self.text, root.get_submodule("text_decoder")
        length = Dim("sequence", 1, self.context)
        ids = TensorSpec("input_ids", (1, length), torch.int64, "ids", text.vocab_size)
        inputs_embeds = TensorSpec("inputs_embeds", (1, length, text.hidden_size))
        positions = [TensorSpec("cache_position", (length,), torch.int64, "positions")]
        if text.mrope_section:
            positions.append(TensorSpec("rope_position", (3, length), torch.int64, "positions"))
        logits = TensorSpec("logits", (1, length, text.vocab_size))
        return (
            Method(
                "vision_encoder", root.get_submodule("vision_encoder"), self.vision_inputs(), (self.image_embeds(),)
            ),
            Method("token_embedding", root.get_submodule("token_embedding"), (ids,), (inputs_embeds,)),
            Method("text_decoder", decoder, (inputs_embeds, *positions), (logits,), caches(decoder)),
        )
