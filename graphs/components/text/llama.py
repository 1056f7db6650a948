"""The LLaMA decoder (Touvron et al., arXiv 2302.13971) over embeddings, with a KV cache kept in buffers.

Shape suffixes: B batch (1 when deployed), S new tokens, C context, D width, A heads, G key-value heads, K head width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.components.text.cache import KVCache, causal_mask
from graphs.components.text.rotary import RotaryTable, rotate


@dataclass(frozen=True)
class LlamaConfig:
    """Field names are those of a LlamaConfig's JSON."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int = 2048
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.groups = config.num_attention_heads // config.num_key_value_heads
        queries = config.num_attention_heads * config.head_width
        keys = config.num_key_value_heads * config.head_width
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KVCache | None, position_S: Tensor | None
    ) -> Tensor:
        q_BASK, k_BGSK, v_BGSK = (
            proj(x_BSD).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BASK, k, v = rotate(q_BASK, cos, sin), rotate(k_BGSK, cos, sin), v_BGSK
        if cache is not None and position_S is not None:
            k, v = cache(k, v, position_S)
        if self.groups > 1:  # as an expand, which every target has, rather than the fused flag of SDPA
            k, v = (t.unsqueeze(2).expand(-1, -1, self.groups, -1, -1).flatten(1, 2) for t in (k, v))
        out_BASK = F.scaled_dot_product_attention(q_BASK, k, v, attn_mask=mask)
        return self.o_proj(out_BASK.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    """The gated feed-forward network (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class LlamaLayer(nn.Module):
    """A pre-norm decoder block; `cache` is present when the decoder is deployed and absent in training."""

    def __init__(self, config: LlamaConfig, context: int | None) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)
        self.cache = KVCache(config.num_key_value_heads, context, config.head_width) if context else None

    def forward(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, position_S: Tensor | None = None
    ) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos, sin, mask, self.cache, position_S)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class LlamaDecoder(nn.Module):
    """Embeddings [1, S, D] at positions [S] (int64) to logits [1, S, V]; each call extends the cache it owns.

    Positions are consecutive. `context` is the most tokens the cache holds; 0 builds the decoder without a cache, for
    training through `hidden` with a mask and rotary tables of the caller's.
    """

    def __init__(self, config: LlamaConfig, context: int) -> None:
        super().__init__()
        self.context = context
        self.rotary = RotaryTable(config.head_width, context or config.max_position_embeddings, config.rope_theta)
        self.layers = nn.ModuleList(LlamaLayer(config, context or None) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def hidden(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, position_S: Tensor | None = None) -> Tensor:
        """The final normed states [B, S, D]; `cos`, `sin` broadcast to [B, A, S, K], `mask` adds to [B, A, S, C]."""
        for layer in self.layers:
            x_BSD = layer(x_BSD, cos, sin, mask, position_S)
        return self.norm(x_BSD)

    def forward(self, inputs_embeds: Tensor, cache_position: Tensor) -> Tensor:
        cos_SK, sin_SK = self.rotary(cache_position)
        mask_SC = causal_mask(cache_position, self.context, inputs_embeds.dtype)
        return self.lm_head(self.hidden(inputs_embeds, cos_SK, sin_SK, mask_SC, cache_position))
