"""The LLaMA decoder (Touvron et al., arXiv 2302.13971) over embeddings, with a KV cache kept in buffers.

Mistral (arXiv 2310.06825) and Qwen2 (arXiv 2407.10671) are the same graph: one bounds attention to a window, the other
has biases on queries, keys and values.
Shape suffixes: B batch (1 when deployed), S new tokens, C context, D width, A heads, G key-value heads, K head width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.components.text.cache import KVCache, causal_mask
from graphs.components.text.rotary import ROPE_TYPES, RopeScaling, RotaryTable, rotate
from graphs.config import ConfigReader


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
    attention_bias: bool = False  # on queries, keys and values
    output_bias: bool = False  # on what leaves attention
    mlp_bias: bool = False
    sliding_window: int = 0  # 0: attention sees the whole context
    rope_scaling: RopeScaling | None = None

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_reader(cls, config: ConfigReader, family: LlamaConfig | None = None) -> Self:
        """The decoder that a config.json, or its `text_config`, describes.

        Keys it lacks are those of `family`; sizes are required without one. Raises: UserError naming the key at fault.
        """
        base = family or cls(0, 0, 0, 0, 0, 0)
        heads = config.int("num_attention_heads", base.num_attention_heads or None, high=1024)
        theta, scaling = read_rope(config, base.rope_theta)
        bias = config.bool("attention_bias", False)
        # A family without windows ignores the key; in one that has them, null says that there is none.
        window = 0 if "sliding_window" in config.values else base.sliding_window
        window = config.int("sliding_window", window, high=1 << 24) if base.sliding_window else 0
        if config.bool("use_sliding_window", False):
            raise config.error("use_sliding_window is true; layers of which only some see a window are not supported")
        text = cls(
            hidden_size=config.int("hidden_size", base.hidden_size or None),
            intermediate_size=config.int("intermediate_size", base.intermediate_size or None),
            num_hidden_layers=config.int("num_hidden_layers", base.num_hidden_layers or None, high=1024),
            num_attention_heads=heads,
            num_key_value_heads=config.int("num_key_value_heads", base.num_key_value_heads or heads, high=heads),
            vocab_size=config.int("vocab_size", base.vocab_size or None, high=1 << 24),
            max_position_embeddings=config.int("max_position_embeddings", base.max_position_embeddings, high=1 << 24),
            head_dim=config.int("head_dim", base.head_dim, high=4096),
            rms_norm_eps=config.float("rms_norm_eps", base.rms_norm_eps, low=0.0, high=1.0),
            rope_theta=theta,
            hidden_act=config.choice("hidden_act", ACTIVATIONS, default=base.hidden_act),
            tie_word_embeddings=config.bool("tie_word_embeddings", False),
            attention_bias=bias or base.attention_bias,
            output_bias=bias,
            mlp_bias=config.bool("mlp_bias", False),
            sliding_window=window,
            rope_scaling=scaling,
        )
        if not text.head_dim and text.hidden_size % heads:
            raise config.error(f"hidden_size {text.hidden_size} is not a multiple of num_attention_heads {heads}")
        if heads % text.num_key_value_heads:
            raise config.error(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {text.num_key_value_heads}"
            )
        if text.head_width % 2:
            raise config.error(f"the head width {text.head_width} is odd, rotary positions need an even one")
        return text


#: `model_type` of a text_config -> the configuration of its class's defaults
FAMILIES: Mapping[str, LlamaConfig] = {
    "llama": LlamaConfig(4096, 11008, 32, 32, 0, 32000),  # as many key-value heads as heads
    "mistral": LlamaConfig(4096, 14336, 32, 32, 8, 32000, max_position_embeddings=4096 * 32, sliding_window=4096),
    "qwen2": LlamaConfig(4096, 22016, 32, 32, 32, 151936, max_position_embeddings=32768, attention_bias=True),
}


def read_rope(config: ConfigReader, theta: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary positions: `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

    Raises: UserError for a scaling that is not known here.
    """
    rope = config.section("rope_parameters" if "rope_parameters" in config else "rope_scaling")
    base = rope if "rope_theta" in rope else config
    theta = base.float("rope_theta", theta, low=1.0, high=1e12)
    key = "rope_type" if "rope_type" in rope else "type"
    kind = rope.choice(key, ROPE_TYPES, default="default")
    if rope.float("partial_rotary_factor", 1.0, high=1.0) != 1.0:
        raise rope.error("partial_rotary_factor is below 1; this decoder turns whole heads")
    if not ROPE_TYPES[kind]:
        return theta, None
    default = RopeScaling(kind, 1.0)
    scaling = RopeScaling(
        kind,
        rope.float("factor", low=0.0, high=1e6),
        rope.float("low_freq_factor", default.low_freq_factor, high=1e6),
        rope.float("high_freq_factor", default.high_freq_factor, high=1e6),
        rope.int("original_max_position_embeddings", default.original_max_position_embeddings, high=1 << 24),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.error(
            f"high_freq_factor {scaling.high_freq_factor:g} is not above low_freq_factor {scaling.low_freq_factor:g}"
        )
    return theta, scaling


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.groups = config.num_attention_heads // config.num_key_value_heads
        queries = config.num_attention_heads * config.head_width
        keys = config.num_key_value_heads * config.head_width
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)

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
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
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
        self.context, self.window = context, config.sliding_window
        positions = context or config.max_position_embeddings
        self.rotary = RotaryTable(config.head_width, positions, config.rope_theta, config.rope_scaling)
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
        mask_SC = causal_mask(cache_position, self.context, inputs_embeds.dtype, self.window)
        return self.lm_head(self.hidden(inputs_embeds, cos_SK, sin_SK, mask_SC, cache_position))
