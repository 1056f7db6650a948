"""The generation loop against a plain one, over the eager runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs.dialogue import Segment
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.trace import trace
from runtimes.base import Array
from runtimes.eager import EagerRuntime
from runtimes.generate import generate, sampler

MODEL = load_model(Request("mobilevlm", "tiny"))
RUNTIME = EagerRuntime(trace(MODEL.architecture, MODEL.weights))
PIXELS = np.random.default_rng(0).integers(0, 256, (1, 3, 48, 48), np.uint8)
SEGMENTS: list[Segment] = [[5, 6, 7], PIXELS, [8, 9]]


def tokens(**options: object) -> list[int]:
    *_, last = generate(RUNTIME, SEGMENTS, context=64, **options)  # type: ignore[arg-type]
    return last.tokens


def test_greedy_equals_prefilling_everything_anew_for_each_token() -> None:
    root = MODEL.architecture.build().eval()
    root.load_state_dict({name: MODEL.weights[name] for name, _ in root.named_parameters()}, strict=False)
    expected: list[int] = []
    with torch.no_grad():
        embed = root.get_submodule("token_embedding")
        image = root.get_submodule("vision_encoder")(torch.from_numpy(PIXELS))
        before, after = (embed(torch.tensor([ids])) for ids in ([5, 6, 7], [8, 9]))
        for _ in range(10):
            made = [embed(torch.tensor([expected]))] if expected else []
            prompt = torch.cat([before, image, after, *made], dim=1)
            logits = root.get_submodule("text_decoder")(prompt, torch.arange(prompt.shape[1]))
            expected.append(int(logits[0, -1].argmax()))
    assert tokens(max_new_tokens=10) == expected


def test_it_stops_at_a_stop_token_and_at_the_context() -> None:
    free = tokens(max_new_tokens=100)
    assert len(free) == 64 - 14 + 1
    assert tokens(stop=[free[3]]) == free[: free.index(free[3])]


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"the prompt is 14 tokens long, pictures included; this bundle's context is 14"
    ):
        list(generate(RUNTIME, SEGMENTS, context=14))


def test_sampling_is_the_seeds_and_greedy_at_zero() -> None:
    logits: Array = np.random.default_rng(1).normal(size=50).astype(np.float32)
    assert sampler(0, 3)(logits) == logits.argmax()
    draws = [[draw(logits) for _ in range(200)] for draw in (sampler(1.0, 3), sampler(1.0, 3), sampler(1.0, 4))]
    assert draws[0] == draws[1] != draws[2]
    shares = np.bincount(draws[0], minlength=50) / 200
    expected = np.exp(logits) / np.exp(logits).sum()
    assert np.abs(shares - expected).max() < 0.1
