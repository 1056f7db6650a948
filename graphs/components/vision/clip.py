"""The vision tower of CLIP (Radford et al. 2021, arXiv 2103.00020), as Hugging Face publishes its weights.

Shape suffixes: B batch, C channels, H W pixels, T tokens with the class token, N patches, D width, A heads, K head
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS


@dataclass(frozen=True)
class ClipVisionConfig:
    """Field names are those of a CLIPVisionConfig's JSON."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


class ClipAttention(nn.Module):
    """Multi-head self-attention over all tokens, biases everywhere."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BATK, k_BATK, v_BATK = (
            proj(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q_BATK, k_BATK, v_BATK).transpose(1, 2).flatten(2))


class ClipMLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_BTD)))


class ClipLayer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = ClipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = ClipMLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.layer_norm1(x_BTD))
        return x_BTD + self.mlp(self.layer_norm2(x_BTD))


class ClipEmbeddings(nn.Module):
    """Patches, a class token in front, learned positions."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.grid**2 + 1, config.hidden_size)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        patches_BND = self.patch_embedding(pixels_BCHW).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.expand(patches_BND.shape[0], 1, -1)
        return torch.cat([class_B1D, patches_BND], dim=1) + self.position_embedding.weight


class ClipVisionTower(nn.Module):
    """Normalised pixels [B, 3, H, W] to patch features [B, N, D] of the layer `select_layer`, class token dropped.

    `select_layer` counts hidden states as LLaVA does (arXiv 2304.08485): -1 is the output of the last layer, -2 that of
    the layer before it. Layers above it are never built.
    """

    def __init__(self, config: ClipVisionConfig, select_layer: int = -2) -> None:
        super().__init__()
        depth = config.num_hidden_layers + 1 + select_layer
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(depth))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BTD = self.pre_layrnorm(self.embeddings(pixels_BCHW))
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return x_BTD[:, 1:]
