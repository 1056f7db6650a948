"""BERT's post-norm block (Devlin et al., arXiv 1810.04805), which also reads other states where it is asked to.

One set of parts serves VisualBERT's encoder, BLIP's mixture of encoder and decoder (arXiv 2201.12086, figure 2) and the
Q-Former of BLIP-2. Keys and values are made apart from the attention that reads them: a decoder gets those of a picture
from outside, computed once.
Shape suffixes: B batch (1 when deployed), S tokens, T tokens that are read, D width, A heads, K head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.components.text.cache import KVCache
from graphs.components.text.cross import KeysValues, Pair
from graphs.config import ConfigReader


@dataclass(frozen=True)
class BertConfig:
    """Field names are those of a BertConfig's JSON."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def reader(self, width: int) -> KeysValues:
        """The module that makes keys and values of states of `width`."""
        return KeysValues(width, self.num_attention_heads, self.head_width)

    @classmethod
    def from_reader(cls, config: ConfigReader, family: BertConfig) -> Self:
        """The blocks that a section of config.json describes; keys it lacks are those of `family`.

        Raises: UserError naming the key at fault.
        """
        found = cls(
            hidden_size=config.int("hidden_size", family.hidden_size),
            intermediate_size=config.int("intermediate_size", family.intermediate_size),
            num_hidden_layers=config.int("num_hidden_layers", family.num_hidden_layers, high=1024),
            num_attention_heads=config.int("num_attention_heads", family.num_attention_heads, high=1024),
            vocab_size=config.int("vocab_size", family.vocab_size, high=1 << 24),
            max_position_embeddings=config.int("max_position_embeddings", family.max_position_embeddings, high=1 << 16),
            hidden_act=config.choice("hidden_act", ACTIVATIONS, default=family.hidden_act),
            layer_norm_eps=config.float("layer_norm_eps", family.layer_norm_eps, low=0.0, high=1.0),
        )
        if found.hidden_size % found.num_attention_heads:
            raise config.error(
                f"hidden_size {found.hidden_size} is not a multiple of num_attention_heads {found.num_attention_heads}"
            )
        return found


BERT_BASE = BertConfig(768, 3072, 12, 12, 30522)


class Attend(nn.Module):
    """Attention of tokens to given keys and values, added to the tokens and normed; `mask` is added to the scores."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x_BSD: Tensor, seen: Pair, mask: Tensor | None = None) -> Tensor:
        q_BASK = self.query(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out_BASK = F.scaled_dot_product_attention(q_BASK, *seen, attn_mask=mask)
        return self.norm(self.dense(out_BASK.transpose(1, 2).flatten(2)) + x_BSD)


class BertMLP(nn.Module):
    """Two linear layers around an activation, added to their input and normed."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.norm(self.down(self.activation(self.up(x_BSD))) + x_BSD)


class BertLayer(nn.Module):
    """A post-norm block; with `crosses` it attends to outer keys and values too, with a `context` it has a cache."""

    def __init__(self, config: BertConfig, crosses: bool = False, context: int = 0) -> None:
        super().__init__()
        self.keys_values = config.reader(config.hidden_size)
        self.attention = Attend(config)
        self.cross = Attend(config) if crosses else None
        self.mlp = BertMLP(config)
        self.cache = KVCache(config.num_attention_heads, context, config.head_width) if context else None

    def attended(self, x_BSD: Tensor, mask: Tensor | None = None, position_S: Tensor | None = None) -> Tensor:
        """What self-attention makes of tokens, before all else."""
        own = self.keys_values(x_BSD)
        if self.cache is not None and position_S is not None:
            own = self.cache(*own, position_S)
        return self.attention(x_BSD, own, mask)

    def forward(
        self, x_BSD: Tensor, mask: Tensor | None = None, seen: Pair | None = None, position_S: Tensor | None = None
    ) -> Tensor:
        x_BSD = self.attended(x_BSD, mask, position_S)
        if self.cross is not None and seen is not None:
            x_BSD = self.cross(x_BSD, seen)
        return self.mlp(x_BSD)


class BertPooler(nn.Module):
    """The first token's state, through a linear layer and a tanh: [B, S, D] to [B, D]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return torch.tanh(self.dense(x_BSD[:, 0]))


class BertVocabularyHead(nn.Module):
    """States [B, S, D] to scores of the vocabulary [B, S, V]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.decoder(self.norm(self.activation(self.dense(x_BSD))))


#: parts of a block here -> in the checkpoints of BERT's family, where `{}` is "self" or, in Q-Formers, "attention"
PARTS: Mapping[str, str] = {
    "keys_values.": "attention.{}.",
    "attention.query.": "attention.{}.query.",
    "attention.dense.": "attention.output.dense.",
    "attention.norm.": "attention.output.LayerNorm.",
    "cross_keys_values.": "crossattention.{}.",
    "cross.query.": "crossattention.{}.query.",
    "cross.dense.": "crossattention.output.dense.",
    "cross.norm.": "crossattention.output.LayerNorm.",
    "mlp.up.": "intermediate.dense.",
    "mlp.down.": "output.dense.",
    "mlp.norm.": "output.LayerNorm.",
    "query_mlp.up.": "intermediate_query.dense.",
    "query_mlp.down.": "output_query.dense.",
    "query_mlp.norm.": "output_query.LayerNorm.",
}


def public_part(part: str, inner: str = "self") -> str:
    """What checkpoints call a parameter of a block, `keys_values.key.weight` say, behind the block's number."""
    ours = next(prefix for prefix in PARTS if part.startswith(prefix))
    return PARTS[ours].format(inner) + part.removeprefix(ours)
