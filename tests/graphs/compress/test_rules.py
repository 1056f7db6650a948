"""Each pass against the published rule written independently (`tests.graphs.compress.rules`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from graphs.compress.base import apply, parse
from graphs.compress.passes.prune import RULES as PRUNING
from tests.graphs.compress import rules
from tests.numbers import relative_l2


def compressed(variant: str | None, text: str, pixels: Tensor) -> Tensor:
    """Image embeddings [N, D] after the passes that `text` writes; their number is the declared one."""
    program = apply(parse(text), rules.model_of(variant)[1])
    (tokens,) = program.module("vision_encoder")(pixels)
    assert program.methods["vision_encoder"].signature.outputs[0].shape == (1, *tokens.shape)
    return tokens


def close(actual: Tensor, expected: rules.Array) -> bool:
    return actual.shape == expected.shape and relative_l2(actual, torch.from_numpy(expected)) < 1e-5


@pytest.mark.parametrize("method", rules.RULES)
@pytest.mark.parametrize(("variant", "keep"), [("tiny", 3), ("tiny-v2", 40), (None, 18), (None, 7)])
def test_prune(variant: str | None, keep: int, method: str) -> None:
    pixels, found = rules.features(variant, seed=3)
    expected = rules.RULES[method](found, keep)
    assert len(expected) == keep
    assert close(compressed(variant, f"prune{{keep={keep},method={method}}}", pixels), expected)


@pytest.mark.parametrize(("variant", "factor"), [("tiny", 3), ("tiny-v2", 4), (None, 2), (None, 3)])
def test_pool(variant: str | None, factor: int) -> None:
    pixels, found = rules.features(variant, seed=3)
    assert close(compressed(variant, f"pool{{factor={factor}}}", pixels), rules.pool(found, factor))


def test_controls_keep_what_they_say_in_raster_order() -> None:
    pixels, found = rules.features(None, seed=3)
    middles = [4 * n + 2 for n in range(9)]
    assert close(compressed(None, "prune{keep=9,method=uniform}", pixels), found.tokens[middles])
    chosen = []
    for seed in (0, 0, 1):
        tokens = compressed(None, f"prune{{keep=9,method=random,seed={seed}}}", pixels).double().numpy()
        at = [int(np.abs(found.tokens - token).sum(1).argmin()) for token in tokens]
        assert np.abs(found.tokens[at] - tokens).max() < 1e-4
        assert at == sorted(set(at))
        chosen.append(at)
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("method", sorted(PRUNING))
def test_keeping_all_changes_nothing(method: str) -> None:
    pixels, found = rules.features(None, seed=3)
    assert close(compressed(None, f"prune{{keep=36,method={method}}}", pixels), found.tokens)


@pytest.mark.parametrize("method", rules.RULES)
def test_a_pool_and_a_prune(method: str) -> None:
    """The second works on what the first left: pooled tokens, each over four times the patches."""
    pixels, found = rules.features(None, seed=3)
    pooled = rules.Features(rules.pool(found, 2), found.attention, found.keys, rules.windows(12, 3))
    expected = rules.RULES[method](pooled, 5)
    assert close(compressed(None, f"pool{{factor=2}};prune{{keep=5,method={method}}}", pixels), expected)


def test_a_prune_of_a_prune() -> None:
    pixels, found = rules.features(None, seed=3)
    found = rules.Features(rules.visionzip(found, 12), found.attention, found.keys, [])
    expected = rules.divprune(found, 6)
    assert close(compressed(None, "prune{keep=12,method=visionzip};prune{keep=6,method=divprune}", pixels), expected)
