"""Text decoders as configured: what the families that Hugging Face names by `model_type` have, as data.

LLaMA (arXiv 2302.13971), Mistral (2310.06825: a window), Qwen2 (2407.10671: biases on queries, keys and values),
Qwen2-VL (2409.12191: positions of three components), Gemma (2403.08295), Gemma 2 (2408.00118: norms on both sides,
capped scores, a window in every other layer), Persimmon (https://www.adept.ai/blog/persimmon-8b: plain MLP, norms of
queries and keys).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from graphs.components.activations import ACTIVATIONS
from graphs.components.text.rotary import ROPE_TYPES, RopeScaling
from graphs.config import ConfigReader


@dataclass(frozen=True)
class TextConfig:
    """Field names are those of a config.json's `text_config`, where it has such.

    `norm`: "rms" or "layer". `qk_norm`: whether each head's queries and keys are normed. `mlp`: a name in
    `graphs.components.text.decoder.MLPS`. `sandwich`: norms behind attention and MLP too. `attention_scale`: of scores,
    0 for one over the root of the head's width. `*_softcap`: bounds by tanh, 0 for none. `full_layers`: those without
    the window. `prefix`: the tokens of one call see each other whatever their order. `embedding_scale`: of what
    `token_embedding` gives. `rotary_fraction`: of a head that is turned. `mrope_section`: how the angles of half a head
    are shared by positions of three components; empty where positions are numbers. `moe_*`: where MLPs are mixtures of
    experts, each of `intermediate_size`: how many, how many of them a token is routed to, and how many see every one.
    """

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
    norm: str = "rms"
    qk_norm: bool = False
    mlp: str = "gated"
    sandwich: bool = False
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    full_layers: tuple[int, ...] = ()
    prefix: bool = False
    embedding_scale: float = 1.0
    rotary_fraction: float = 1.0
    mrope_section: tuple[int, ...] = ()
    moe_num_experts: int = 0
    moe_topk: int = 0
    moe_num_shared_experts: int = 0

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """How many values of a head are turned."""
        return int(self.head_width * self.rotary_fraction)

    @classmethod
    def from_reader(cls, config: ConfigReader, family: TextConfig | None = None) -> Self:
        """The decoder that a config.json, or its `text_config`, describes.

        Keys it lacks are those of `family`; sizes are required without one. Raises: UserError naming the key at fault.
        """
        base = family or cls(0, 0, 0, 0, 0, 0)
        heads = config.int("num_attention_heads", base.num_attention_heads or None, high=1024)
        hidden_size = config.int("hidden_size", base.hidden_size or None)
        layers = config.int("num_hidden_layers", base.num_hidden_layers or None, high=1024)
        theta, scaling = read_rope(config, base.rope_theta)
        bias = config.bool("attention_bias", base.output_bias)
        # A family without windows ignores the key; in one that has them, null says that there is none.
        window = 0 if "sliding_window" in config.values else base.sliding_window
        window = config.int("sliding_window", window, high=1 << 24) if base.sliding_window else 0
        if config.bool("use_sliding_window", False):
            raise config.error("use_sliding_window is true; layers of which only some see a window are not supported")
        scalar = "query_pre_attn_scalar"
        text = cls(
            hidden_size=hidden_size,
            intermediate_size=config.int("intermediate_size", base.intermediate_size or None),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=config.int("num_key_value_heads", base.num_key_value_heads or heads, high=heads),
            vocab_size=config.int("vocab_size", base.vocab_size or None, high=1 << 24),
            max_position_embeddings=config.int("max_position_embeddings", base.max_position_embeddings, high=1 << 24),
            head_dim=config.int("head_dim", base.head_dim, high=4096),
            rms_norm_eps=config.float(
                "layer_norm_eps" if base.norm == "layer" else "rms_norm_eps", base.rms_norm_eps, low=0.0, high=1.0
            ),
            rope_theta=theta,
            hidden_act=config.choice(
                "hidden_activation" if config.values.get("hidden_activation") else "hidden_act",
                ACTIVATIONS,
                default=base.hidden_act,
            ),
            tie_word_embeddings=config.bool("tie_word_embeddings", base.tie_word_embeddings),
            attention_bias=bias or base.attention_bias,
            output_bias=bias,
            mlp_bias=config.bool("mlp_bias", base.mlp_bias),
            sliding_window=window,
            rope_scaling=scaling,
            norm=base.norm,
            qk_norm=config.bool("qk_layernorm", base.qk_norm),
            mlp=base.mlp,
            sandwich=base.sandwich,
            attention_scale=config.float(scalar, low=1e-3, high=1e6) ** -0.5
            if scalar in config
            else base.attention_scale,
            attention_softcap=read_cap(config, "attn_logit_softcapping", base.attention_softcap),
            logit_softcap=read_cap(config, "final_logit_softcapping", base.logit_softcap),
            full_layers=read_full_layers(config, layers, base.full_layers),
            prefix=base.prefix,
            embedding_scale=hidden_size**0.5 if base.embedding_scale != 1.0 else 1.0,
            rotary_fraction=read_fraction(config, base.rotary_fraction),
            mrope_section=read_sections(config, base.mrope_section),
        )
        if not text.head_dim and text.hidden_size % heads:
            raise config.error(f"hidden_size {text.hidden_size} is not a multiple of num_attention_heads {heads}")
        if heads % text.num_key_value_heads:
            raise config.error(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {text.num_key_value_heads}"
            )
        if text.rotary_width % 2:
            raise config.error(f"{text.rotary_width} values of a head turn: rotary positions need an even number")
        if text.mrope_section and 2 * sum(text.mrope_section) != text.rotary_width:
            raise config.error(f"mrope_section sums to {sum(text.mrope_section)}, not to half of {text.rotary_width}")
        return text


GEMMA = TextConfig(
    3072,
    24576,
    28,
    16,
    16,
    256000,
    max_position_embeddings=8192,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    embedding_scale=3072**0.5,
)
GEMMA2 = TextConfig(
    2304,
    9216,
    26,
    8,
    4,
    256000,
    max_position_embeddings=8192,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    sliding_window=4096,
    sandwich=True,
    attention_scale=256**-0.5,
    attention_softcap=50.0,
    logit_softcap=30.0,
    full_layers=tuple(range(1, 1024, 2)),
    embedding_scale=2304**0.5,
)
QWEN2_VL = TextConfig(
    8192, 29568, 80, 64, 8, 152064, 32768, rms_norm_eps=1e-5, attention_bias=True, mrope_section=(16, 24, 24)
)
PERSIMMON = TextConfig(
    4096,
    16384,
    36,
    64,
    64,
    262144,
    max_position_embeddings=16384,
    rms_norm_eps=1e-5,
    rope_theta=25000.0,
    hidden_act="relu2",
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    norm="layer",
    qk_norm=True,
    mlp="plain",
    rotary_fraction=0.5,
)

#: `model_type` of a text_config -> the configuration of its class's defaults
FAMILIES: Mapping[str, TextConfig] = {
    "llama": TextConfig(4096, 11008, 32, 32, 0, 32000),  # as many key-value heads as heads
    "mistral": TextConfig(4096, 14336, 32, 32, 8, 32000, max_position_embeddings=4096 * 32, sliding_window=4096),
    "qwen2": TextConfig(4096, 22016, 32, 32, 32, 151936, max_position_embeddings=32768, attention_bias=True),
    "qwen2_vl_text": QWEN2_VL,
    "qwen2_5_vl_text": QWEN2_VL,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "persimmon": PERSIMMON,
}


def read_cap(config: ConfigReader, key: str, default: float) -> float:
    """A bound on scores; null and 0 say that there is none."""
    if key in config.values and config.values[key] is None:
        return 0.0
    return config.float(key, default, low=0.0, high=1e6)


def read_full_layers(config: ConfigReader, layers: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """The layers without a window: those that `layer_types` says, or of the family's pattern. Raises: UserError."""
    types = config.values.get("layer_types")
    if types is None or not default:
        return tuple(layer for layer in default if layer < layers)
    known = {"full_attention", "sliding_attention"}
    if not isinstance(types, list) or len(types) != layers or not known.issuperset(map(str, types)):
        raise config.error(f"layer_types must be {layers} of {sorted(known)}")
    return tuple(layer for layer, kind in enumerate(types) if kind == "full_attention")


def rope_section(config: ConfigReader) -> ConfigReader:
    """`rope_parameters`, or the older `rope_scaling`."""
    return config.section("rope_parameters" if "rope_parameters" in config else "rope_scaling")


def read_sections(config: ConfigReader, default: tuple[int, ...]) -> tuple[int, ...]:
    """How three components of a position share a head, in families that have such. Raises: UserError."""
    given = rope_section(config).values.get("mrope_section")
    if not default or given is None:
        return default
    if not isinstance(given, list) or len(given) != 3 or not all(isinstance(n, int) and 0 < n < 4096 for n in given):
        raise config.error("mrope_section must be three positive numbers")
    return tuple(given)


def read_fraction(config: ConfigReader, default: float) -> float:
    """How much of a head is turned, in families that may turn part of it. Raises: UserError."""
    rope, key = rope_section(config), "partial_rotary_factor"
    fraction = (rope if key in rope else config).float(key, default, low=0.0, high=1.0)
    if default == 1.0 and fraction != 1.0:
        raise rope.error("partial_rotary_factor is below 1; this decoder turns whole heads")
    return fraction


def read_rope(config: ConfigReader, theta: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary positions: `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

    Raises: UserError for a scaling that is not known here.
    """
    rope = rope_section(config)
    base = rope if "rope_theta" in rope else config
    theta = base.float("rope_theta", theta, low=1.0, high=1e12)
    key = "rope_type" if "rope_type" in rope else "type"
    kind = rope.choice(key, ROPE_TYPES, default="default")
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
