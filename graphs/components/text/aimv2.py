"""AIMv2's text tower (Fini et al., arXiv 2411.14402), which its LiT checkpoint has: causal, pooled where a text ends.

Shape suffixes: B batch, T tokens, D width, P width of the shared space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from graphs.components.activations import ACTIVATIONS
from graphs.components.gated_encoder import GatedEncoderLayer
from graphs.components.stack import AlikeLayers
from graphs.components.text.clip import CausalMask, first
from graphs.components.vision.aimv2 import check_heads
from graphs.config import ConfigReader


@dataclass(frozen=True)
class Aimv2TextConfig:
    """Field names are those of an Aimv2TextConfig's JSON, but `attention_bias`, its `qkv_bias`, and the last two.

    `projection_dim`: width of the shared space. `pad_token_id`: stands behind the text; which one changes nothing.
    """

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    attention_bias: bool = False
    mlp_bias: bool = False
    projection_dim: int = 512
    pad_token_id: int = 49407

    @classmethod
    def from_reader(cls, config: ConfigReader, projection_dim: int) -> Self:
        """The tower that a `text_config` describes, with transformers' defaults. Raises: UserError.

        Apple's files say `max_context_length` and `use_bias` for what are now `max_position_embeddings` and `mlp_bias`.
        """
        base = cls()
        length = config.int("max_context_length", base.max_position_embeddings, high=1 << 16)
        end = config.int("eos_token_id", base.eos_token_id, low=0, high=1 << 24)
        tower = cls(
            hidden_size=config.int("hidden_size", base.hidden_size),
            intermediate_size=config.int("intermediate_size", base.intermediate_size),
            num_hidden_layers=config.int("num_hidden_layers", base.num_hidden_layers, high=1024),
            num_attention_heads=config.int("num_attention_heads", base.num_attention_heads, high=1024),
            vocab_size=config.int("vocab_size", base.vocab_size, high=1 << 24),
            max_position_embeddings=config.int("max_position_embeddings", length, high=1 << 16),
            hidden_act=config.choice("hidden_act", ACTIVATIONS, default=base.hidden_act),
            rms_norm_eps=config.float("rms_norm_eps", base.rms_norm_eps, low=0.0, high=1.0),
            eos_token_id=end,
            attention_bias=config.bool("qkv_bias", False),
            mlp_bias=config.bool("mlp_bias", config.bool("use_bias", False)),
            projection_dim=projection_dim,
            pad_token_id=config.int("pad_token_id", end, low=0, high=1 << 24),
        )
        check_heads(config, tower)
        return tower


class Aimv2TextTower(AlikeLayers):
    """Ids [1, T] (int64), padded to the tower's length, to a text's embedding [1, P], not normalised."""

    def __init__(self, config: Aimv2TextConfig) -> None:
        super().__init__()
        self.end = config.eos_token_id
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.causal = CausalMask(config.max_position_embeddings)
        self.layers = nn.ModuleList(GatedEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.rms_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BTD = self.token_embedding(input_ids) + self.position_embedding.weight
        mask = self.causal()
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask)
        pooled_BD = x_BTD[0].index_select(0, first(input_ids == self.end))
        return self.projection(self.rms_norm(pooled_BD))
