"""BART (Lewis et al., arXiv 1910.13461) over embeddings: an encoder that ends in keys and values, a decoder.

Keys and values that the decoder's cross-attention reads depend on the encoder alone, so they are computed once, there,
for all layers; the decoder takes them as inputs and keeps a cache of its own tokens. Weights are named as in
transformers' BartModel.
Shape suffixes: M source tokens, S new tokens, C context, D width, L decoder layers, A heads, K head width,
V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.components.encoder import EncoderAttention
from graphs.components.stack import AlikeLayers
from graphs.components.text.cache import KVCache, causal_mask
from graphs.components.text.config import TextConfig
from graphs.components.text.cross import CrossCaches, Pair, of_layer
from graphs.config import ConfigReader

EPS = 1e-5  # no config.json says another


def read_bart(config: ConfigReader) -> tuple[TextConfig, TextConfig]:
    """The encoder and the decoder that the keys of a BartConfig describe, with BART large's values where one is absent.

    Raises: UserError naming the key at fault.
    """
    width = config.int("d_model", 1024)
    if not config.bool("tie_word_embeddings", True):
        raise config.error("tie_word_embeddings is false; encoder, decoder and head have one vocabulary here")

    def side(name: str) -> TextConfig:
        heads = config.int(f"{name}_attention_heads", 16, high=1024)
        if width % heads:
            raise config.error(f"d_model {width} is not a multiple of {name}_attention_heads {heads}")
        return TextConfig(
            hidden_size=width,
            intermediate_size=config.int(f"{name}_ffn_dim", 4096),
            num_hidden_layers=config.int(f"{name}_layers", 12, high=1024),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=config.int("vocab_size", 50265, high=1 << 24),
            max_position_embeddings=config.int("max_position_embeddings", 1024, high=1 << 24),
            rms_norm_eps=EPS,
            hidden_act=config.choice("activation_function", ACTIVATIONS, default="gelu"),
            tie_word_embeddings=True,
            norm="layer",
            embedding_scale=width**0.5 if config.bool("scale_embedding", False) else 1.0,
        )

    return side("encoder"), side("decoder")


def split(x_1SD: Tensor, heads: int) -> Tensor:
    """[1, S, D] as [1, A, S, K]."""
    return x_1SD.unflatten(-1, (heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """What every layer ends in: two linear layers, added to their input and normed."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, EPS)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_1SD: Tensor) -> Tensor:
        return self.final_layer_norm(x_1SD + self.fc2(self.activation(self.fc1(x_1SD))))


class BartEncoderLayer(nn.Module):
    """A post-norm block."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = EncoderAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, EPS)
        self.feed_forward = FeedForward(config)

    def forward(self, x_1MD: Tensor) -> Tensor:
        return self.feed_forward(self.self_attn_layer_norm(x_1MD + self.self_attn(x_1MD)))


class BartEncoder(AlikeLayers):
    """Embeddings [1, M, D] to `cross_keys` and `cross_values`, both [L, A, M, K], of the decoder's layers."""

    def __init__(self, config: TextConfig, decoder: TextConfig) -> None:
        super().__init__()
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layernorm_embedding = nn.LayerNorm(config.hidden_size, EPS)
        self.layers = nn.ModuleList(BartEncoderLayer(config) for _ in range(config.num_hidden_layers))
        heads, width = decoder.num_attention_heads, decoder.head_width
        self.cross = CrossCaches(decoder.num_hidden_layers, config.hidden_size, heads, width)

    def forward(self, inputs_embeds: Tensor) -> tuple[Tensor, Tensor]:
        positions_MD = self.embed_positions.weight[: inputs_embeds.shape[1]]
        x_1MD = self.layernorm_embedding(inputs_embeds + positions_MD)
        for layer in self.layers:
            x_1MD = layer(x_1MD)
        return self.cross(x_1MD)


class BartSelfAttention(EncoderAttention):
    """Attention of new tokens to all that the cache holds."""

    def attend(self, x_1SD: Tensor, mask_SC: Tensor, cache: KVCache, position_S: Tensor) -> Tensor:
        q_1ASK, k_1ASK, v_1ASK = (split(proj(x_1SD), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        k_1ACK, v_1ACK = cache(k_1ASK, v_1ASK, position_S)
        out_1ASK = F.scaled_dot_product_attention(q_1ASK, k_1ACK, v_1ACK, attn_mask=mask_SC)
        return self.out_proj(out_1ASK.transpose(1, 2).flatten(2))


class BartCrossAttention(nn.Module):
    """Attention of new tokens to the encoder's keys and values [1, A, M, K]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_1SD: Tensor, seen: Pair) -> Tensor:
        out_1ASK = F.scaled_dot_product_attention(split(self.q_proj(x_1SD), self.heads), *seen)
        return self.out_proj(out_1ASK.transpose(1, 2).flatten(2))


class BartDecoderLayer(nn.Module):
    """A post-norm block that attends to its own tokens, then to the encoder's."""

    def __init__(self, config: TextConfig, context: int) -> None:
        super().__init__()
        self.self_attn = BartSelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, EPS)
        self.encoder_attn = BartCrossAttention(config)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.hidden_size, EPS)
        self.feed_forward = FeedForward(config)
        self.cache = KVCache(config.num_attention_heads, context, config.head_width)

    def forward(self, x_1SD: Tensor, mask_SC: Tensor, position_S: Tensor, seen: Pair) -> Tensor:
        attended_1SD = self.self_attn.attend(x_1SD, mask_SC, self.cache, position_S)
        x_1SD = self.self_attn_layer_norm(x_1SD + attended_1SD)
        x_1SD = self.encoder_attn_layer_norm(x_1SD + self.encoder_attn(x_1SD, seen))
        return self.feed_forward(x_1SD)


class BartDecoder(nn.Module):
    """Embeddings [1, S, D] at positions [S] (int64), `cross_keys` and `cross_values` [L, A, M, K] to logits [1, S, V].

    Each call extends the cache of at most `context` tokens. `bias`: whether logits have one.
    """

    def __init__(self, config: TextConfig, context: int, bias: bool = False) -> None:
        super().__init__()
        self.context = context
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layernorm_embedding = nn.LayerNorm(config.hidden_size, EPS)
        self.layers = nn.ModuleList(BartDecoderLayer(config, context) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias)

    def forward(
        self, inputs_embeds: Tensor, cache_position: Tensor, cross_keys: Tensor, cross_values: Tensor
    ) -> Tensor:
        mask_SC = causal_mask(cache_position, self.context, inputs_embeds.dtype)
        x_1SD = self.layernorm_embedding(inputs_embeds + self.embed_positions(cache_position))
        for index, layer in enumerate(self.layers):
            x_1SD = layer(x_1SD, mask_SC, cache_position, of_layer(cross_keys, cross_values, index))
        return self.lm_head(x_1SD)
