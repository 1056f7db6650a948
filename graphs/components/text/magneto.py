"""The decoder of KOSMOS-2 (Peng et al., arXiv 2306.14824): Magneto (arXiv 2210.06423) with sinusoidal positions.

A second norm stands inside attention and inside the MLP, before what leaves them. Weights are named as in
transformers' Kosmos2TextTransformer.
Shape suffixes: S new tokens, C context, D width, A heads, K head width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.components.encoder import EncoderAttention
from graphs.components.stack import AlikeLayers
from graphs.components.text.cache import KVCache, causal_mask
from graphs.components.text.config import TextConfig
from graphs.config import ConfigReader


def read_magneto(config: ConfigReader) -> TextConfig:
    """The decoder that the keys of a Kosmos2TextConfig describe, with its defaults. Raises: UserError."""
    width, heads = config.int("embed_dim", 2048, low=4), config.int("attention_heads", 32, high=1024)
    if width % heads:
        raise config.error(f"embed_dim {width} is not a multiple of attention_heads {heads}")
    if config.bool("add_cross_attention", False):
        raise config.error("add_cross_attention is true; KOSMOS-2 reads pictures among its tokens")
    return TextConfig(
        hidden_size=width,
        intermediate_size=config.int("ffn_dim", 8192),
        num_hidden_layers=config.int("layers", 24, high=1024),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=config.int("vocab_size", 65037, high=1 << 24),
        max_position_embeddings=config.int("max_position_embeddings", 2048, high=1 << 24),
        rms_norm_eps=config.float("layer_norm_eps", 1e-5, low=0.0, high=1.0),
        hidden_act=config.choice("activation_function", ACTIVATIONS, default="gelu"),
        tie_word_embeddings=config.bool("tie_word_embeddings", True),
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm="layer",
        mlp="plain",
        embedding_scale=math.sqrt(width) if config.bool("scale_embedding", True) else 1.0,
    )


class SinusoidTable(nn.Module):
    """Positions [S] (int64) to sines and cosines [S, D], looked up from the row `first` on."""

    table: Tensor

    def __init__(self, width: int, positions: int, first: int) -> None:
        super().__init__()
        self.width, self.positions, self.first = width, positions, first
        self.register_buffer("table", self.tables()["table"])

    def tables(self) -> dict[str, Tensor]:
        """The value of the buffer; asked for again where the module was built on fake tensors.

        In float32, whose rounding of large angles the published weights were trained with.
        """
        half = self.width // 2
        frequency = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
        angle = torch.arange(self.first, self.first + self.positions).float()[:, None] * frequency
        odd = torch.zeros(self.positions, self.width % 2)
        return {"table": torch.cat([angle.sin(), angle.cos(), odd], dim=1)}

    def forward(self, position_S: Tensor) -> Tensor:
        return self.table.index_select(0, position_S)


class MagnetoAttention(EncoderAttention):
    """Attention of new tokens to all that the cache holds, normed before the output projection."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.inner_attn_ln = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)

    def attend(self, x_1SD: Tensor, mask_SC: Tensor, cache: KVCache, position_S: Tensor) -> Tensor:
        q_1ASK, k_1ASK, v_1ASK = (
            proj(x_1SD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        k_1ACK, v_1ACK = cache(k_1ASK, v_1ASK, position_S)
        out_1ASK = F.scaled_dot_product_attention(q_1ASK, k_1ACK, v_1ACK, attn_mask=mask_SC)
        return self.out_proj(self.inner_attn_ln(out_1ASK.transpose(1, 2).flatten(2)))


class MagnetoMLP(nn.Module):
    """Two linear layers, with an activation and a norm between them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_layernorm = nn.LayerNorm(config.intermediate_size, config.rms_norm_eps)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_1SD: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(self.activation(self.fc1(x_1SD))))


class MagnetoLayer(nn.Module):
    """A pre-norm block with norms inside attention and MLP too."""

    def __init__(self, config: TextConfig, context: int) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MagnetoAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = MagnetoMLP(config)
        self.cache = KVCache(config.num_attention_heads, context, config.head_width)

    def forward(self, x_1SD: Tensor, mask_SC: Tensor, position_S: Tensor) -> Tensor:
        x_1SD = x_1SD + self.self_attn.attend(self.self_attn_layer_norm(x_1SD), mask_SC, self.cache, position_S)
        return x_1SD + self.ffn(self.final_layer_norm(x_1SD))


class MagnetoDecoder(AlikeLayers):
    """Embeddings [1, S, D] at positions [S] (int64) to logits [1, S, V]; each call extends the cache it owns.

    `first`: the position, among the sinusoids, of the first token.
    """

    def __init__(self, config: TextConfig, context: int, first: int) -> None:
        super().__init__()
        self.context = context
        self.embed_positions = SinusoidTable(config.hidden_size, context, first)
        self.layers = nn.ModuleList(MagnetoLayer(config, context) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, inputs_embeds: Tensor, cache_position: Tensor) -> Tensor:
        mask_SC = causal_mask(cache_position, self.context, inputs_embeds.dtype)
        x_1SD = inputs_embeds + self.embed_positions(cache_position)
        for layer in self.layers:
            x_1SD = layer(x_1SD, mask_SC, cache_position)
        return self.lm_head(self.layer_norm(x_1SD))
