"""The tower of Llama 3.2 Vision (arXiv 2407.21783): tiles told apart by aspect-ratio embeddings, two stages of layers.

The tiles of a picture are one sequence: local layers, then global ones whose branches are gated by tanh; what enters
cross-attention is the last state beside some states between. Weights are named as in transformers' MllamaVisionModel.
Shape suffixes: P tiles (padding ones included), C H W channels and pixels, T tokens of a tile with its class token,
U those tokens padded, N = P * U, M = P * T, D width, A heads, K head width, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.components.encoder import EncoderMLP
from graphs.components.text.cache import MASKED
from graphs.config import ConfigReader
from graphs.preprocess.canvas import arrangements

MULTIPLE = 8  # tiles are padded to a multiple of it, and tokens do attend to that padding


@dataclass(frozen=True)
class MllamaVisionConfig:
    """Field names are those of a MllamaVisionConfig's JSON, but for heads. `states`: the local layers kept beside."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_global_layers: int = 8
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    max_num_tiles: int = 4
    states: tuple[int, ...] = (3, 7, 15, 23, 30)
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    @property
    def tokens(self) -> int:
        """Tokens of one tile, the class token among them."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def features(self) -> int:
        """Width of what leaves the tower."""
        return self.hidden_size * (1 + len(self.states))

    @property
    def ratios(self) -> int:
        """Entries of the tables that aspect ratios choose from; the first is for no picture."""
        return len(arrangements(self.max_num_tiles)) + 1

    @classmethod
    def from_reader(cls, config: ConfigReader) -> Self:
        """The tower that a `vision_config` describes, with the class's defaults. Raises: UserError naming the key."""
        base = cls()
        config.int("num_channels", 3, low=3, high=3)
        layers = config.int("num_hidden_layers", base.num_hidden_layers, high=1024)
        tower = cls(
            hidden_size=config.int("hidden_size", base.hidden_size),
            intermediate_size=config.int("intermediate_size", base.intermediate_size),
            num_hidden_layers=layers,
            num_global_layers=config.int("num_global_layers", base.num_global_layers, high=1024),
            num_attention_heads=config.int("attention_heads", base.num_attention_heads, high=1024),
            image_size=config.int("image_size", base.image_size, high=8192),
            patch_size=config.int("patch_size", base.patch_size, high=1024),
            max_num_tiles=config.int("max_num_tiles", base.max_num_tiles, high=64),
            states=read_indices(config, "intermediate_layers_indices", base.states, layers),
            hidden_act=config.choice("hidden_act", ACTIVATIONS, default=base.hidden_act),
            layer_norm_eps=config.float("norm_eps", base.layer_norm_eps, low=0.0, high=1.0),
        )
        if tower.hidden_size % tower.num_attention_heads:
            raise config.error(
                f"hidden_size {tower.hidden_size} is not a multiple of attention_heads {tower.num_attention_heads}"
            )
        if tower.patch_size > tower.image_size:
            raise config.error(f"patch_size {tower.patch_size} is larger than image_size {tower.image_size}")
        ratios = config.values.get("supported_aspect_ratios")
        if ratios is not None and ratios != [list(pair) for pair in arrangements(tower.max_num_tiles)]:
            raise config.error(f"supported_aspect_ratios must be all that {tower.max_num_tiles} tiles allow, in order")
        if config.int("vision_output_dim", tower.features, high=1 << 24) != tower.features:
            raise config.error(
                f"vision_output_dim must be {tower.features}: the last state and {len(tower.states)} more"
            )
        return tower


def read_indices(config: ConfigReader, key: str, default: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Numbers below `count`, rising; `default` where the key is absent. Raises: UserError."""
    given: Any = config.values.get(key)
    given = list(default) if given is None else given
    if not isinstance(given, list) or not all(isinstance(n, int) and 0 <= n < count for n in given):
        raise config.error(f"{key} must be a list of numbers from 0 to {count - 1}")
    if given != sorted(set(given)):
        raise config.error(f"{key} must rise")
    return tuple(given)


class TileEmbedding(nn.Module):
    """Adds to the tokens [P, T, D] of each tile what its place in the picture's aspect ratio says, gated."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.tiles = config.max_num_tiles
        self.embedding = nn.Embedding(config.ratios, config.max_num_tiles * config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_PTD: Tensor, ratio_1: Tensor) -> Tensor:
        return x_PTD + self.embedding(ratio_1).reshape(self.tiles, 1, -1) * self.gate.tanh()


class TilePositions(nn.Module):
    """Adds positions to tokens [P, T, D]: of a tile alone, and of the tile in its picture, weighed by a gate."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.shape = (config.max_num_tiles, config.tokens, config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.zeros(config.tokens, config.hidden_size))
        self.tile_embedding = nn.Embedding(config.ratios, config.max_num_tiles * config.tokens * config.hidden_size)

    def forward(self, x_PTD: Tensor, ratio_1: Tensor) -> Tensor:
        gate = self.gate.tanh()
        return x_PTD + (1 - gate) * self.embedding + gate * self.tile_embedding(ratio_1).reshape(self.shape)


class TileAttention(nn.Module):
    """Multi-head attention without biases."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x_1ND: Tensor, mask_NN: Tensor) -> Tensor:
        q, k, v = (
            proj(x_1ND).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_1ANK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_NN)
        return self.o_proj(out_1ANK.transpose(1, 2).flatten(2))


class TileLayer(nn.Module):
    """A pre-norm block; the branches of a `gated` one are multiplied by the tanh of a learned number."""

    def __init__(self, config: MllamaVisionConfig, gated: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = TileAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = EncoderMLP(config)
        self.gate_attn = nn.Parameter(torch.zeros(1)) if gated else None
        self.gate_ffn = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, x_1ND: Tensor, mask_NN: Tensor) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_1ND), mask_NN)
        x_1ND = x_1ND + (attended if self.gate_attn is None else self.gate_attn.tanh() * attended)
        mixed = self.mlp(self.post_attention_layernorm(x_1ND))
        return x_1ND + (mixed if self.gate_ffn is None else self.gate_ffn.tanh() * mixed)


class TileLayers(nn.Module):
    """Layers in turn; gives the state behind each."""

    def __init__(self, config: MllamaVisionConfig, count: int, gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TileLayer(config, gated) for _ in range(count))

    def forward(self, x_1ND: Tensor, mask_NN: Tensor) -> list[Tensor]:
        states = []
        for layer in self.layers:
            x_1ND = layer(x_1ND, mask_NN)
            states.append(x_1ND)
        return states


class MllamaTower(nn.Module):
    """Normalised tiles [P, 3, S, S], the aspect ratio's id [1], tiles that show something [P] to features [1, M, F].

    Of the features, the first D are the last state, then come those of the states kept, side by side, channel by
    channel.
    """

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, side, stride=side, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.gated_positional_embedding = TilePositions(config)
        self.layernorm_pre = nn.LayerNorm(width)
        self.transformer = TileLayers(config, config.num_hidden_layers, gated=False)
        self.layernorm_post = nn.LayerNorm(width)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.global_transformer = TileLayers(config, config.num_global_layers, gated=True)

    @property
    def padded(self) -> int:
        """Tokens of one tile with its padding."""
        return -(-self.config.tokens // MULTIPLE) * MULTIPLE

    def mask(self, shown_P: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, N] to add to scores: padding, of tiles and within them, does not see padding; all else is seen."""
        real_U = torch.arange(self.padded, device=shown_P.device) < self.config.tokens
        empty_N = 1.0 - (shown_P.unsqueeze(1) * real_U).reshape(-1).to(dtype)
        return empty_N.unsqueeze(1) * empty_N.unsqueeze(0) * MASKED

    def cut(self, x_1NF: Tensor) -> Tensor:
        """[1, N, F] without the padding within tiles, [1, M, F]."""
        tiles, tokens = self.config.max_num_tiles, self.config.tokens
        return x_1NF.reshape(tiles, self.padded, -1)[:, :tokens].reshape(1, tiles * tokens, -1)

    def forward(self, tiles_PCHW: Tensor, ratio_1: Tensor, shown_P: Tensor) -> Tensor:
        tiles, width = self.config.max_num_tiles, self.config.hidden_size
        x_PTD = self.patch_embedding(tiles_PCHW).flatten(2).transpose(1, 2)
        x_PTD = self.pre_tile_positional_embedding(x_PTD, ratio_1)
        x_PTD = torch.cat([self.class_embedding.expand(tiles, 1, -1), x_PTD], dim=1)
        x_PTD = self.layernorm_pre(self.gated_positional_embedding(x_PTD, ratio_1))
        x_1ND = F.pad(x_PTD, (0, 0, 0, self.padded - self.config.tokens)).reshape(1, -1, width)
        mask_NN = self.mask(shown_P, x_1ND.dtype)
        states = self.transformer(x_1ND, mask_NN)
        x_PUD = self.layernorm_post(states[-1]).reshape(tiles, self.padded, width)
        x_1ND = self.post_tile_positional_embedding(x_PUD, ratio_1).reshape(1, -1, width)
        last_1ND = self.global_transformer(x_1ND, mask_NN)[-1]
        kept_1NF = torch.stack([states[index] for index in self.config.states], dim=-1).flatten(2)
        return torch.cat([self.cut(last_1ND), self.cut(kept_1NF)], dim=-1)
