"""The decoder of Llama 3.2 Vision (arXiv 2407.21783): LLaMA with gated layers that attend to pictures alone.

What those layers read of a picture does not depend on the text: `PictureCaches` makes it once, in the vision encoder.
Weights are named as in transformers' MllamaTextModel. As there, a token that sees no picture attends to all of them,
and its MLP branch is left out; without any picture, keys and values are zeros and the layers add nothing.
Shape suffixes: S new tokens, C context, M tokens of all pictures, D width, L cross-attention layers, A heads, G
key-value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.text.cache import MASKED, causal_mask
from graphs.components.text.config import TextConfig
from graphs.components.text.cross import KeysValues, Pair, of_layer
from graphs.components.text.decoder import DecoderLayer
from graphs.components.text.mlp import GatedMLP
from graphs.components.text.rotary import RotaryTable

#: the configuration of MllamaTextConfig's defaults
MLLAMA = TextConfig(
    4096, 14336, 40, 32, 8, 128256, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0
)


class PictureCache(nn.Module):
    """States [1, M, D] to keys, normed, and values of one layer, [1, G, M, K] each."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.reader = KeysValues(config.hidden_size, config.num_key_value_heads, config.head_width, bias=False)
        self.k_norm = nn.RMSNorm(config.head_width, config.rms_norm_eps)

    def forward(self, x_1MD: Tensor) -> Pair:
        k_1GMK, v_1GMK = self.reader(x_1MD)
        return self.k_norm(k_1GMK), v_1GMK


class PictureCaches(nn.Module):
    """States [1, M, D] to keys and values of all `layers` cross-attention layers, [L, G, M, K] each."""

    def __init__(self, config: TextConfig, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PictureCache(config) for _ in range(layers))

    def forward(self, x_1MD: Tensor) -> Pair:
        keys, values = zip(*(layer(x_1MD) for layer in self.layers), strict=True)
        return torch.cat(keys), torch.cat(values)


class CrossAttention(nn.Module):
    """Attention of tokens [1, S, D] to keys and values [1, G, M, K], queries normed by head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.groups = config.num_attention_heads // config.num_key_value_heads
        inner = config.num_attention_heads * config.head_width
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_width, config.rms_norm_eps)

    def forward(self, x_1SD: Tensor, seen: Pair, mask_SM: Tensor) -> Tensor:
        q_1ASK = self.q_norm(self.q_proj(x_1SD).unflatten(-1, (-1, self.head_width)).transpose(1, 2))
        k, v = seen
        if self.groups > 1:
            k, v = (t.unsqueeze(2).expand(-1, -1, self.groups, -1, -1).flatten(1, 2) for t in seen)
        out_1ASK = F.scaled_dot_product_attention(q_1ASK, k, v, attn_mask=mask_SM)
        return self.o_proj(out_1ASK.transpose(1, 2).flatten(2))


class CrossLayer(nn.Module):
    """A pre-norm block over pictures, whose branches are multiplied by the tanh of a learned number."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = CrossAttention(config)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_1SD: Tensor, seen: Pair, mask_SM: Tensor, sees_S1: Tensor) -> Tensor:
        attended_1SD = self.cross_attn(self.input_layernorm(x_1SD), seen, mask_SM)
        x_1SD = x_1SD + self.cross_attn_attn_gate.tanh() * attended_1SD
        mixed_1SD = self.mlp(self.post_attention_layernorm(x_1SD)) * sees_S1
        return x_1SD + self.cross_attn_mlp_gate.tanh() * mixed_1SD


class CrossDecoder(nn.Module):
    """Embeddings [1, S, D] at positions [S] (int64) to logits [1, S, V]; each call extends the cache it owns.

    `cross_layers`: which of the layers attend to pictures. They read `cross_keys` and `cross_values` [L, G, M, K];
    `cross_shown` [M, 1] is 1 where a picture's token shows something, 0 for padding; `cross_span` [S, 2] (int64) says
    which of the M tokens, from and to, each token sees.
    """

    def __init__(self, config: TextConfig, context: int, cross_layers: tuple[int, ...]) -> None:
        super().__init__()
        self.context, self.cross_layers = context, cross_layers
        self.rotary = RotaryTable(config.head_width, context, config.rope_theta, config.rope_scaling)
        self.layers = nn.ModuleList(
            CrossLayer(config) if index in cross_layers else DecoderLayer(config, context)
            for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        inputs_embeds: Tensor,
        cache_position: Tensor,
        cross_keys: Tensor,
        cross_values: Tensor,
        cross_shown: Tensor,
        cross_span: Tensor,
    ) -> Tensor:
        x_1SD, dtype = inputs_embeds, inputs_embeds.dtype
        cos_SK, sin_SK = self.rotary(cache_position)
        causal_SC = causal_mask(cache_position, self.context, dtype)
        first_S1, last_S1 = cross_span[:, :1], cross_span[:, 1:]
        sees_S1 = (last_S1 > first_S1).to(dtype)
        token_M = torch.arange(cross_keys.shape[2], device=cross_keys.device)
        within_SM = (token_M >= first_S1).to(dtype) * (token_M < last_S1).to(dtype)
        mask_SM = (1.0 - within_SM * cross_shown.transpose(0, 1)) * sees_S1 * MASKED
        order = iter(range(len(self.cross_layers)))
        for layer in self.layers:
            if isinstance(layer, CrossLayer):
                x_1SD = layer(x_1SD, of_layer(cross_keys, cross_values, next(order)), mask_SM, sees_S1)
            else:
                x_1SD = layer(x_1SD, cos_SK, sin_SK, causal_SC, cache_position)
        return self.lm_head(self.norm(x_1SD))
