"""FastV once more, straight from the paper: tokens leave the tensors, each layer has a cache of its own length.

Nothing here is shared with the product but weights by name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


class FastV:
    """A LLaMA decoder, one sequence. Shape suffixes: S tokens of a call still there, T tokens in a layer's cache."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        layers: int,
        heads: int,
        groups: int,
        theta: float,
        eps: float,
        at: int,
        keep: int,
    ) -> None:
        self.w, self.layers, self.heads, self.groups = weights, layers, heads, groups
        self.theta, self.eps, self.at, self.keep = theta, eps, at, keep
        self.caches: list[tuple[Tensor, Tensor]] = []

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.w[f"text_decoder.{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"text_decoder.{name}.weight"].T

    def turn(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotate [heads, S, K] as complex numbers, pairs (i, i + K/2)."""
        half = x.shape[-1] // 2
        angle = position[:, None].double() * self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    def call(self, x: Tensor, image: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [S, D], which are of a picture (bool [S]), positions [S]; logits and positions that stayed."""
        first = not self.caches
        for layer in range(self.layers):
            name = f"layers.{layer}."
            normed = self.norm(x, f"{name}input_layernorm")
            q, k, v = (
                self.linear(normed, f"{name}self_attn.{p}_proj").unflatten(-1, (n, -1)).transpose(0, 1)
                for p, n in (("q", self.heads), ("k", self.groups), ("v", self.groups))
            )
            q, k = self.turn(q, position), self.turn(k, position)
            old = 0 if first else self.caches[layer][0].shape[1]
            if not first:
                k, v = (torch.cat([was, new], 1) for was, new in zip(self.caches[layer], (k, v), strict=True))
            self.caches[layer : layer + 1] = [(k, v)]
            k, v = (t.repeat_interleave(self.heads // self.groups, 0) for t in (k, v))
            score = q @ k.mT / q.shape[-1] ** 0.5
            later = torch.arange(k.shape[1])[None] > torch.arange(old, k.shape[1])[:, None]
            paid = score.masked_fill(later, -torch.inf).softmax(-1)
            x = x + self.linear((paid @ v).transpose(0, 1).flatten(1), f"{name}self_attn.o_proj")
            normed = self.norm(x, f"{name}post_attention_layernorm")
            x = x + self.linear(
                F.silu(self.linear(normed, f"{name}mlp.gate_proj")) * self.linear(normed, f"{name}mlp.up_proj"),
                f"{name}mlp.down_proj",
            )
            if layer == self.at - 1:
                received = paid[:, -1, old:].mean(0)
                ranked = sorted(torch.where(image)[0].tolist(), key=lambda n: -float(received[n]))
                stay = sorted({*range(len(x))} - {*ranked[self.keep :]})
                x, position = x[stay], position[stay]
        return self.linear(self.norm(x, "norm"), "lm_head"), position
