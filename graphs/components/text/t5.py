"""T5's encoder and decoder (Raffel et al., arXiv 1910.10683; version 1.1 and Flan-T5, arXiv 2210.11416).

Pre-norm blocks without biases; scores are not scaled, but moved by learned numbers for how far apart two tokens are,
the same in every layer. What the decoder's cross-attention reads of the prompt is made by the encoder, once.
Shape suffixes: B batch (1 when deployed), S tokens, T tokens that are read, C context, D width, A heads, K head width,
L layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.stack import AlikeLayers
from graphs.components.text.cache import KVCache, causal_mask
from graphs.components.text.config import TextConfig
from graphs.components.text.cross import CrossCaches, KeysValues, Pair, of_layer
from graphs.components.text.decoder import MLPS
from graphs.config import ConfigReader

NO_END = 1 << 24  # positions are distances, of which there is no last

#: `feed_forward_proj` of a config.json -> `mlp` and `hidden_act` of a TextConfig
FEED_FORWARD: Mapping[str, tuple[str, str]] = {
    "relu": ("plain", "relu"),
    "gelu": ("plain", "gelu"),
    "gated-gelu": ("gated", "gelu_pytorch_tanh"),
    "gated-relu": ("gated", "relu"),
    "gated-silu": ("gated", "silu"),
}


@dataclass(frozen=True)
class T5Options:
    """What a T5 has besides a TextConfig, which describes its decoder.

    `buckets`, `max_distance`: how many numbers for distances there are, and from where on one serves all.
    `scaled_output`: whether states are scaled before the head, as in checkpoints of the first version. `start`: the id
    that begins what is decoded.
    """

    encoder_layers: int
    buckets: int = 32
    max_distance: int = 128
    scaled_output: bool = False
    start: int = 0


def read_t5(config: ConfigReader) -> tuple[TextConfig, T5Options]:
    """The model that a `text_config` describes, with transformers' defaults. Raises: UserError naming the key."""
    layers = config.int("num_layers", 6, high=1024)
    heads = config.int("num_heads", 8, high=1024)
    buckets = config.int("relative_attention_num_buckets", 32, low=4, high=1 << 16)
    if buckets % 4:
        raise config.error(f"relative_attention_num_buckets is {buckets}; it must be a multiple of 4")
    mlp, activation = FEED_FORWARD[config.choice("feed_forward_proj", FEED_FORWARD, default="relu")]
    text = TextConfig(
        hidden_size=config.int("d_model", 512),
        intermediate_size=config.int("d_ff", 2048),
        num_hidden_layers=config.int("num_decoder_layers", layers, high=1024),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=config.int("vocab_size", 32128, high=1 << 24),
        max_position_embeddings=NO_END,
        head_dim=config.int("d_kv", 64, high=4096),
        rms_norm_eps=config.float("layer_norm_epsilon", 1e-6, low=0.0, high=1.0),
        hidden_act=activation,
        tie_word_embeddings=True,
        mlp=mlp,
    )
    # Published files say by an untied head that nothing is scaled; transformers 5 ties heads and says this apart.
    scaled = config.bool("scale_decoder_outputs", config.bool("tie_word_embeddings", True))
    pad = config.int("pad_token_id", 0, low=0, high=1 << 24)
    return text, T5Options(
        encoder_layers=layers,
        buckets=buckets,
        max_distance=config.int("relative_attention_max_distance", 128, low=buckets, high=1 << 20),
        scaled_output=scaled,
        start=config.int("decoder_start_token_id", pad, low=0, high=1 << 24),
    )


def reader(text: TextConfig) -> KeysValues:
    """The module that makes a layer's keys and values of its own tokens."""
    return KeysValues(text.hidden_size, text.num_attention_heads, text.head_width, bias=False)


class DistanceBias(nn.Module):
    """Positions [S] and [T] (int64), below `reach`, to what is added to scores, [1, A, S, T].

    Near distances have a bucket each, far ones share logarithmically wider ones; in the encoder those behind and those
    ahead are apart.
    """

    bucket: Tensor

    def __init__(self, options: T5Options, heads: int, reach: int, ahead: bool) -> None:
        super().__init__()
        self.options, self.reach, self.ahead = options, reach, ahead
        self.relative_attention_bias = nn.Embedding(options.buckets, heads)
        self.register_buffer("bucket", self.tables()["bucket"])

    def tables(self) -> dict[str, Tensor]:
        """The bucket of each distance, key - query, from 1 - reach on; asked for again after a fake build."""
        distance = torch.arange(1 - self.reach, self.reach)
        buckets = self.options.buckets // 2 if self.ahead else self.options.buckets
        offset = (distance > 0) * buckets if self.ahead else torch.zeros_like(distance)
        far = distance.abs() if self.ahead else (-distance).clamp(min=0)
        exact = buckets // 2
        ratio = torch.log(far.clamp(min=1).float() / exact) / math.log(self.options.max_distance / exact)
        shared = (exact + (ratio * (buckets - exact)).to(torch.int64)).clamp(max=buckets - 1)
        return {"bucket": offset + torch.where(far < exact, far, shared)}

    def forward(self, query_S: Tensor, key_T: Tensor) -> Tensor:
        by_distance = self.relative_attention_bias(self.bucket)
        index_ST = key_T - query_S.unsqueeze(1) + (self.reach - 1)
        return F.embedding(index_ST, by_distance).permute(2, 0, 1).unsqueeze(0)


class T5Attend(nn.Module):
    """Normed tokens [B, S, D] to what they take of given keys and values; `mask` is added to the scores."""

    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        self.heads, self.unscaled = text.num_attention_heads, text.head_width**0.5
        inner = text.num_attention_heads * text.head_width
        self.query = nn.Linear(text.hidden_size, inner, bias=False)
        self.out = nn.Linear(inner, text.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, seen: Pair, mask: Tensor | None = None) -> Tensor:
        q_BASK = (self.query(x_BSD) * self.unscaled).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out_BASK = F.scaled_dot_product_attention(q_BASK, *seen, attn_mask=mask)
        return self.out(out_BASK.transpose(1, 2).flatten(2))


class T5Layer(nn.Module):
    """A pre-norm block; with a `context` it has a cache and attends to outer keys and values too: the decoder's."""

    def __init__(self, text: TextConfig, context: int = 0) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.keys_values = reader(text)
        self.attention = T5Attend(text)
        self.cross_norm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps) if context else None
        self.cross = T5Attend(text) if context else None
        self.mlp_norm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.mlp = MLPS[text.mlp](text)
        self.cache = KVCache(text.num_attention_heads, context, text.head_width) if context else None

    def forward(
        self, x_BSD: Tensor, mask: Tensor, seen: Pair | None = None, position_S: Tensor | None = None
    ) -> Tensor:
        normed = self.norm(x_BSD)
        own = self.keys_values(normed)
        if self.cache is not None and position_S is not None:
            own = self.cache(*own, position_S)
        x_BSD = x_BSD + self.attention(normed, own, mask)
        if self.cross is not None and self.cross_norm is not None and seen is not None:
            x_BSD = x_BSD + self.cross(self.cross_norm(x_BSD), seen)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))


class T5Encoder(AlikeLayers):
    """Embeddings [1, S, D] of a prompt to the decoder's keys and values of it, [L, A, S, K] each."""

    positions: Tensor

    def __init__(self, text: TextConfig, options: T5Options, context: int) -> None:
        super().__init__()
        heads, width = text.num_attention_heads, text.hidden_size
        self.context = context
        self.register_buffer("positions", self.tables()["positions"])
        self.bias = DistanceBias(options, heads, context, ahead=True)
        self.layers = nn.ModuleList(T5Layer(text) for _ in range(options.encoder_layers))
        self.norm = nn.RMSNorm(width, text.rms_norm_eps)
        self.cross = CrossCaches(text.num_hidden_layers, width, heads, text.head_width, bias=False)

    def tables(self) -> dict[str, Tensor]:
        """The value of the buffer; asked for again where the module was built on fake tensors."""
        return {"positions": torch.arange(self.context)}

    def forward(self, inputs_embeds: Tensor) -> Pair:
        position_S = self.positions[: inputs_embeds.shape[1]]
        mask = self.bias(position_S, position_S)
        x_1SD = inputs_embeds
        for layer in self.layers:
            x_1SD = layer(x_1SD, mask)
        pair: Pair = self.cross(self.norm(x_1SD))
        return pair


class T5Decoder(nn.Module):
    """Embeddings [1, S, D] at positions [S] (int64), and `T5Encoder`'s outputs, to logits [1, S, V]."""

    def __init__(self, text: TextConfig, options: T5Options, context: int) -> None:
        super().__init__()
        self.context = context
        self.scale = text.hidden_size**-0.5 if options.scaled_output else 1.0
        self.bias = DistanceBias(options, text.num_attention_heads, context, ahead=False)
        self.layers = nn.ModuleList(T5Layer(text, context) for _ in range(text.num_hidden_layers))
        self.norm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    def forward(
        self, inputs_embeds: Tensor, cache_position: Tensor, cross_keys: Tensor, cross_values: Tensor
    ) -> Tensor:
        key_C = torch.arange(self.context, device=cache_position.device)
        mask = self.bias(cache_position, key_C) + causal_mask(cache_position, self.context, inputs_embeds.dtype)
        x_1SD = inputs_embeds
        for index, layer in enumerate(self.layers):
            x_1SD = layer(x_1SD, mask, of_layer(cross_keys, cross_values, index), cache_position)
        states = self.norm(x_1SD)
        return self.lm_head(states if self.scale == 1.0 else states * self.scale)


#: parts of a block here -> in checkpoints, behind `block.N.layer.`; those of the MLP are numbered by what stands before
PARTS: Mapping[str, str] = {
    "norm.": "0.layer_norm.",
    "keys_values.key.": "0.SelfAttention.k.",
    "keys_values.value.": "0.SelfAttention.v.",
    "attention.query.": "0.SelfAttention.q.",
    "attention.out.": "0.SelfAttention.o.",
    "cross_norm.": "1.layer_norm.",
    "cross.query.": "1.EncDecAttention.q.",
    "cross.out.": "1.EncDecAttention.o.",
    "mlp_norm.": "{mlp}.layer_norm.",
    "mlp.gate_proj.": "{mlp}.DenseReluDense.wi_0.",
    "mlp.up_proj.": "{mlp}.DenseReluDense.{up}.",
    "mlp.down_proj.": "{mlp}.DenseReluDense.wo.",
}


def public_name(parameter: str, text: TextConfig) -> str:
    """What checkpoints call a parameter, given by its name in the root module."""
    method, rest = parameter.split(".", 1)
    stack = "encoder" if method == "text_encoder" else "decoder"
    if rest.startswith("cross.layers."):
        _, _, number, part, kind = rest.split(".")
        return f"decoder.block.{number}.layer.1.EncDecAttention.{part[0]}.{kind}"
    if rest.startswith("layers."):
        _, number, part = rest.split(".", 2)
        ours = next(prefix for prefix in PARTS if part.startswith(prefix))
        up = "wi_1" if text.mlp == "gated" else "wi"
        theirs = PARTS[ours].format(mlp=1 if stack == "encoder" else 2, up=up)
        return f"{stack}.block.{number}.layer.{theirs}{part.removeprefix(ours)}"
    if rest.startswith("bias."):
        return f"{stack}.block.0.layer.0.SelfAttention.{rest.removeprefix('bias.')}"
    if rest.startswith("norm."):
        return f"{stack}.final_layer_{rest}"
    return "shared.weight" if text.tie_word_embeddings or method == "token_embedding" else rest
