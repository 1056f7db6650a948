"""The pre-norm decoder with rotary positions over embeddings, with a KV cache kept in buffers, as `TextConfig` says.

Shape suffixes: B batch (1 when deployed), S new tokens, C context, D width, A heads, G key-value heads, K head width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.stack import AlikeLayers
from graphs.components.text.cache import KVCache, causal_mask
from graphs.components.text.config import TextConfig
from graphs.components.text.experts import MixtureOfExperts
from graphs.components.text.mlp import GatedMLP, PlainMLP
from graphs.components.text.rotary import RotaryTable, mixed, rotate


class TokenEmbedding(nn.Embedding):
    """Ids [1, S] (int64) to embeddings [1, S, D], times the family's scale."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.scale = config.embedding_scale

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds_BSD = super().forward(input_ids)
        return embeds_BSD if self.scale == 1.0 else embeds_BSD * self.scale


def norm(config: TextConfig, width: int) -> nn.Module:
    """The family's norm over the last `width` values."""
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(width, config.rms_norm_eps)


def capped(x: Tensor, cap: float) -> Tensor:
    """`x` bent into (-cap, cap), as Gemma 2 does (arXiv 2408.00118); as it is where `cap` is 0."""
    return torch.tanh(x / cap) * cap if cap else x


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_width, self.rotary_width = config.head_width, config.rotary_width
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.softcap = config.attention_softcap
        # The factor by which queries differ from those of attention as it is usually scaled
        self.query_scale = config.attention_scale * config.head_width**0.5 if config.attention_scale else 1.0
        queries = config.num_attention_heads * config.head_width
        keys = config.num_key_value_heads * config.head_width
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm = norm(config, config.head_width) if config.qk_norm else None
        self.k_norm = norm(config, config.head_width) if config.qk_norm else None

    def turned(self, x_BASK: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Queries or keys at their positions; as they are where no angles are given."""
        if cos is None or sin is None:
            return x_BASK
        width = self.rotary_width
        if width == self.head_width:
            return rotate(x_BASK, cos, sin)
        return torch.cat([rotate(x_BASK[..., :width], cos, sin), x_BASK[..., width:]], dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if not self.softcap:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.transpose(-1, -2) * self.head_width**-0.5
        return torch.softmax(capped(scores, self.softcap) + mask, dim=-1) @ v

    def forward(
        self,
        x_BSD: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        mask: Tensor,
        cache: KVCache | None,
        position_S: Tensor | None,
    ) -> Tensor:
        q_BASK, k_BGSK, v_BGSK = (
            proj(x_BSD).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BASK, k_BGSK = self.q_norm(q_BASK), self.k_norm(k_BGSK)
        q_BASK, k, v = self.turned(q_BASK, cos, sin), self.turned(k_BGSK, cos, sin), v_BGSK
        if self.query_scale != 1.0:
            q_BASK = q_BASK * self.query_scale
        if cache is not None and position_S is not None:
            k, v = cache(k, v, position_S)
        if self.groups > 1:  # as an expand, which every target has, rather than the fused flag of SDPA
            k, v = (t.unsqueeze(2).expand(-1, -1, self.groups, -1, -1).flatten(1, 2) for t in (k, v))
        return self.o_proj(self.attend(q_BASK, k, v, mask).transpose(1, 2).flatten(2))


#: `mlp` of a TextConfig -> its module
MLPS: Mapping[str, Callable[[TextConfig], nn.Module]] = {
    "gated": GatedMLP,
    "plain": PlainMLP,
    "experts": MixtureOfExperts,
}


class DecoderLayer(nn.Module):
    """A pre-norm decoder block; `cache` is present when the decoder is deployed and absent in training.

    Parameter names are those of Hugging Face's families: `post_attention_layernorm` stands before the MLP, but where
    norms stand on both sides (`sandwich`) behind attention, as its name says.
    """

    def __init__(self, config: TextConfig, context: int | None) -> None:
        super().__init__()
        self.input_layernorm = norm(config, config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = norm(config, config.hidden_size)
        self.sandwich = config.sandwich
        if config.sandwich:
            self.pre_feedforward_layernorm = norm(config, config.hidden_size)
            self.post_feedforward_layernorm = norm(config, config.hidden_size)
        self.mlp = MLPS[config.mlp](config)
        self.cache = KVCache(config.num_key_value_heads, context, config.head_width) if context else None

    def forward(
        self, x_BSD: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor, position_S: Tensor | None = None
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_BSD), cos, sin, mask, self.cache, position_S)
        if self.sandwich:
            x_BSD = x_BSD + self.post_attention_layernorm(attended)
            return x_BSD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BSD)))
        x_BSD = x_BSD + attended
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class TextDecoder(AlikeLayers):
    """Embeddings [1, S, D] at positions [S] (int64) to logits [1, S, V]; each call extends the cache it owns.

    Positions are consecutive; where the family's positions have three components (`mrope_section`), those, [3, S], are
    a third input, which turn heads, and the second says where the cache is written. `context` is the most tokens the
    cache holds; 0 builds the decoder without a cache, for training through `hidden` with a mask and rotary tables of
    the caller's.
    """

    def __init__(self, config: TextConfig, context: int) -> None:
        super().__init__()
        self.context, self.config = context, config
        positions = context or config.max_position_embeddings
        self.rotary = RotaryTable(config.rotary_width, positions, config.rope_theta, config.rope_scaling)
        self.layers = nn.ModuleList(DecoderLayer(config, context or None) for _ in range(config.num_hidden_layers))
        self.norm = norm(config, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def repeated(self) -> nn.ModuleList | None:
        """The layers, where all are run alike."""
        return None if self.config.full_layers else self.layers

    def hidden(
        self,
        x_BSD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        position_S: Tensor | None = None,
        full_mask: Tensor | None = None,
    ) -> Tensor:
        """The final normed states [B, S, D]; `cos`, `sin` broadcast to [B, A, S, K], masks add to [B, A, S, C].

        `full_mask` is for the layers without a window, where others have one.
        """
        for index, layer in enumerate(self.layers):
            sees_all = full_mask is not None and index in self.config.full_layers
            x_BSD = layer(x_BSD, cos, sin, full_mask if sees_all else mask, position_S)
        return self.norm(x_BSD)

    def states(self, inputs_embeds: Tensor, cache_position: Tensor, rope_position: Tensor | None = None) -> Tensor:
        """The final normed states [1, S, D]."""
        config, dtype = self.config, inputs_embeds.dtype
        cos_SK, sin_SK = (
            self.rotary(cache_position)
            if rope_position is None
            else mixed(self.rotary, rope_position, config.mrope_section)
        )
        windows = (
            (config.sliding_window, 0) if config.full_layers and config.sliding_window else (config.sliding_window,)
        )
        masks = [causal_mask(cache_position, self.context, dtype, window, config.prefix) for window in windows]
        return self.hidden(inputs_embeds, cos_SK, sin_SK, masks[0], cache_position, *masks[1:])

    def forward(self, inputs_embeds: Tensor, cache_position: Tensor, rope_position: Tensor | None = None) -> Tensor:
        logits = self.lm_head(self.states(inputs_embeds, cache_position, rope_position))
        return capped(logits, self.config.logit_softcap)
