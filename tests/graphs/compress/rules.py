"""The published rules once more, token by token in numpy, on features that hooks take from the eager modules.

Nothing here is shared with the product but the modules of the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphs.model import Model, Request, load_model
from graphs.program import Program
from graphs.trace import trace

Array = NDArray[np.float64]


@cache
def model_of(variant: str | None) -> tuple[Model, Program]:
    """A model (None: the trained one that ships) and its program."""
    model = load_model(Request("mobilevlm", variant))
    return model, trace(model.architecture, model.weights)


@dataclass
class Features:
    """Tokens [N, D] of a picture, the last layer's attention [heads, T, T] and keys [P, D], windows over patches."""

    tokens: Array
    attention: Array
    keys: Array
    windows: list[list[int]]  # for each token, the patches it lies over


@cache
def features(variant: str | None, seed: int) -> tuple[torch.Tensor, Features]:
    """Pixels [1, 3, H, W] and what the eager modules make of them."""
    model, program = model_of(variant)
    root = model.architecture.build().eval()
    root.load_state_dict(dict(model.weights), strict=False)
    encoder: Any = root.get_submodule("vision_encoder")
    attention = encoder.tower.layers[-1].self_attn
    seen: dict[str, Array] = {}
    for name in ("q_proj", "k_proj"):
        attention.get_submodule(name).register_forward_hook(
            lambda module, given, out, name=name: seen.update({name: out[0].detach().double().numpy()})
        )
    pixels = next(program.methods["vision_encoder"].signature.method("v").examples(seed))[0]
    with torch.no_grad():
        tokens = encoder(pixels)[0].double().numpy()
    heads = attention.heads
    queries, keys = (np.stack(np.split(seen[name], heads, axis=1)) for name in ("q_proj", "k_proj"))
    logits = np.einsum("htk,hsk->hts", queries, keys) / np.sqrt(queries.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    patches, side = int((len(seen["k_proj"]) - 1) ** 0.5), int(len(tokens) ** 0.5)
    return pixels, Features(tokens, weights, seen["k_proj"][1:], windows(patches, side))


def windows(patches: int, side: int) -> list[list[int]]:
    """For each of side x side tokens in raster order, the patches of a patches x patches grid that it lies over."""
    step = patches // side
    return [
        [(row * step + y) * patches + column * step + x for y in range(step) for x in range(step)]
        for row in range(side)
        for column in range(side)
    ]


def received(found: Features) -> Array:
    """The class token's attention to each token: over heads and the token's patches, on average."""
    paid = found.attention[:, 0, 1:].mean(0)
    return np.array([paid[window].mean() for window in found.windows])


def cls_attention(found: Features, keep: int) -> Array:
    best = sorted(range(len(found.tokens)), key=lambda n: -received(found)[n])[:keep]
    return found.tokens[sorted(best)]


def distance(a: Array, b: Array) -> float:
    """One minus the cosine similarity."""
    return float(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def divprune(found: Features, keep: int) -> Array:
    """Algorithm 1 of arXiv 2503.02175: farthest from the nearest, first of all tokens, then of those kept."""
    tokens, kept = found.tokens, []
    while len(kept) < keep:
        others = kept or list(range(len(tokens)))
        gaps = {
            n: min(distance(tokens[n], tokens[o]) for o in others if o != n)
            for n in range(len(tokens))
            if n not in kept
        }
        kept.append(max(gaps, key=lambda n: gaps[n]))
    return tokens[sorted(kept)]


def cdpruner(found: Features, keep: int) -> Array:
    """Equations 5 to 7 of arXiv 2506.10967, relevance by attention: each next token makes the determinant largest."""
    relevance = received(found)
    relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min()) + 1e-6
    unit = found.tokens / np.linalg.norm(found.tokens, axis=1, keepdims=True)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance[None]
    kept: list[int] = []
    while len(kept) < keep:
        rest = [n for n in range(len(unit)) if n not in kept]
        kept.append(max(rest, key=lambda n: np.linalg.slogdet(kernel[np.ix_([*kept, n], [*kept, n])])[1]))
    return found.tokens[sorted(kept)]


def visionzip(found: Features, keep: int) -> Array:
    """Section 3 of arXiv 2412.04467, 10 of 64 tokens contextual: each the mean of itself and those most like it."""
    contextual = max(1, round(keep * 10 / 64))
    order = sorted(range(len(found.tokens)), key=lambda n: -received(found)[n])
    dominant, rest = sorted(order[: keep - contextual]), sorted(order[keep - contextual :])
    targets = rest[:: len(rest) // contextual][:contextual]
    keys = [found.keys[window].mean(0) for window in found.windows]
    groups: dict[int, list[int]] = {target: [target] for target in targets}
    for n in rest:
        if n not in targets:
            groups[min(targets, key=lambda target: distance(keys[n], keys[target]))].append(n)
    merged = {**{n: [n] for n in dominant}, **groups}
    return np.stack([found.tokens[merged[n]].mean(0) for n in sorted(merged)])


def tome(found: Features, keep: int) -> Array:
    """Section 3 of arXiv 2210.09461, as lists of members: rounds of bipartite matching until `keep` groups remain."""
    groups = [[n] for n in range(len(found.tokens))]
    while len(groups) > keep:
        means = [found.tokens[group].mean(0) for group in groups]
        even, odd = range(0, len(groups), 2), range(1, len(groups), 2)
        partner = {a: min(odd, key=lambda b: distance(means[a], means[b])) for a in even}
        closest = sorted(even, key=lambda a: distance(means[a], means[partner[a]]))
        joining = closest[: min(len(groups) // 2, len(groups) - keep)]
        for a in joining:
            groups[partner[a]] = groups[partner[a]] + groups[a]
        groups = [group for n, group in enumerate(groups) if n not in joining]
    return np.stack([found.tokens[group].mean(0) for group in groups])


def pool(found: Features, factor: int) -> Array:
    side = int(len(found.tokens) ** 0.5)
    return np.stack([found.tokens[window].mean(0) for window in windows(side, side // factor)])


RULES = {
    "cdpruner": cdpruner,
    "cls_attention": cls_attention,
    "divprune": divprune,
    "tome": tome,
    "visionzip": visionzip,
}
