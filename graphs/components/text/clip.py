"""The text towers of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343), as Hugging Face publishes their weights.

Both always read `max_position_embeddings` tokens, padded behind the text: CLIP attends causally and takes the state of
the token that ends the text, so padding changes nothing; SigLIP attends to everything and takes the last state.
Shape suffixes: B batch, T tokens, D width, P width of the shared space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from graphs.components.activations import ACTIVATIONS
from graphs.components.encoder import EncoderLayer
from graphs.components.stack import AlikeLayers
from graphs.components.text.cache import causal_mask
from graphs.config import ConfigReader


@dataclass(frozen=True)
class ClipTextConfig:
    """Field names are those of a CLIPTextConfig's JSON, but for the last three.

    `projection_dim`: width of the shared space. `causal`: whether a token sees only those before it. `pool`: the
    name in `POOLS` of the token whose state is taken. `projection_bias`: whether the projection has one.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    projection_dim: int
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    pad_token_id: int = 1
    causal: bool = True
    pool: str = "end"
    projection_bias: bool = False

    @classmethod
    def from_reader(cls, config: ConfigReader, family: ClipTextConfig, projection_dim: int | None) -> Self:
        """The tower that a `text_config` describes; keys it lacks are those of `family`.

        `projection_dim`: None for the tower's own width. Raises: UserError naming the key at fault.
        """
        vocabulary = config.int("vocab_size", family.vocab_size, high=1 << 24)
        width = config.int("hidden_size", family.hidden_size)
        end = config.int("eos_token_id", family.eos_token_id, low=0, high=1 << 24)
        text = cls(
            hidden_size=width,
            intermediate_size=config.int("intermediate_size", family.intermediate_size),
            num_hidden_layers=config.int("num_hidden_layers", family.num_hidden_layers, high=1024),
            num_attention_heads=config.int("num_attention_heads", family.num_attention_heads, high=1024),
            vocab_size=vocabulary,
            projection_dim=projection_dim or width,
            max_position_embeddings=config.int("max_position_embeddings", family.max_position_embeddings, high=1 << 16),
            hidden_act=config.choice("hidden_act", ACTIVATIONS, default=family.hidden_act),
            layer_norm_eps=config.float("layer_norm_eps", family.layer_norm_eps, low=0.0, high=1.0),
            eos_token_id=end,
            pad_token_id=config.int("pad_token_id", family.pad_token_id, low=0, high=1 << 24),
            causal=family.causal,
            # The first published files say 2, which ends nothing: there the highest id ends the text.
            pool="highest" if family.pool == "end" and end == 2 else family.pool,
            projection_bias=family.projection_bias,
        )
        if width % text.num_attention_heads:
            raise config.error(
                f"hidden_size {width} is not a multiple of num_attention_heads {text.num_attention_heads}"
            )
        return text


CLIP_TEXT = ClipTextConfig(512, 2048, 12, 8, 49408, 512)
SIGLIP_TEXT = ClipTextConfig(
    768, 3072, 12, 12, 32000, 768, 64, "gelu_pytorch_tanh", 1e-6, causal=False, pool="last", projection_bias=True
)


def first(marked_BT: Tensor) -> Tensor:
    """The first true position [B] of each row; 0 where there is none. Unique scores, so that no target breaks ties."""
    length = marked_BT.shape[1]
    order_T = torch.arange(length, 0, -1, device=marked_BT.device)
    return (marked_BT * order_T).to(torch.float32).argmax(dim=1)


#: `pool` of a ClipTextConfig -> position [1] of the token to take, from ids [1, T] and the id that ends a text
POOLS: Mapping[str, Callable[[Tensor, int], Tensor] | None] = {
    "end": lambda ids_BT, end: first(ids_BT == end),
    "highest": lambda ids_BT, _: first(ids_BT == ids_BT.amax(dim=1, keepdim=True)),
    "last": None,
}


class ClipTextEmbeddings(nn.Module):
    """Tokens and learned positions."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.token_embedding(ids_BT) + self.position_embedding.weight


class CausalMask(nn.Module):
    """The mask [T, T] as a table."""

    mask: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("mask", self.tables()["mask"])

    def tables(self) -> dict[str, Tensor]:
        """The value of the buffer; asked for again where the module was built on fake tensors."""
        return {"mask": causal_mask(torch.arange(self.length), self.length, torch.float32)}

    def forward(self) -> Tensor:
        return self.mask


class ClipTextTower(AlikeLayers):
    """Ids [1, T] (int64), padded to the tower's length, to a text's embedding [1, P], not normalised."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.end, self.pool = config.eos_token_id, POOLS[config.pool]
        self.embeddings = ClipTextEmbeddings(config)
        self.causal = CausalMask(config.max_position_embeddings) if config.causal else None
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, config.projection_bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BTD = self.embeddings(input_ids)
        mask = self.causal() if self.causal is not None else None
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask)
        pooled_BD = x_BTD[:, -1] if self.pool is None else x_BTD[0].index_select(0, self.pool(input_ids, self.end))
        return self.projection(self.final_layer_norm(pooled_BD))
