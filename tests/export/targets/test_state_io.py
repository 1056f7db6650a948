"""State as inputs and outputs: the same numbers, other names."""

from __future__ import annotations

import pytest
import torch

from export.targets.state_io import explicit_state, io_names, state_pairs
from graphs.program import Program
from tests.tiny import tiny_program


@pytest.fixture(scope="module")
def program() -> Program:
    return tiny_program("tiny")


def test_names() -> None:
    assert io_names("layers.11.cache.k") == ("past_key_values.11.key", "present.11.key")
    assert io_names("layers.0.cache.v") == ("past_key_values.0.value", "present.0.value")
    assert io_names("memory.bank") == ("past.memory.bank", "present.memory.bank")


def test_signature_and_graph_agree(program: Program) -> None:
    explicit = explicit_state(program)
    explicit.check()
    signature = explicit.methods["text_decoder"].signature
    assert signature.state == ()
    assert [s.name for s in signature.inputs[:3]] == ["inputs_embeds", "cache_position", "past_key_values.0.key"]
    assert [s.name for s in signature.outputs[:2]] == ["logits", "present.0.key"]
    assert [s.shape for s in signature.inputs[2:]] == [(1, 2, 64, 16)] * 4
    assert state_pairs(signature) == {
        f"past_key_values.{layer}.{part}": f"present.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")
    }
    assert not any("cache" in entry for entry in explicit.methods["text_decoder"].exported.state_dict)
    assert explicit.methods["vision_encoder"] is program.methods["vision_encoder"]
    assert program.methods["text_decoder"].signature.state, "the program it was made from is as it was"


def test_numbers_are_the_same(program: Program) -> None:
    explicit = explicit_state(program)
    own, passed = program.module("text_decoder"), explicit.module("text_decoder")
    state = [torch.zeros(spec.size({})) for spec in program.methods["text_decoder"].signature.state]
    for call in program.methods["text_decoder"].signature.method("text_decoder").examples(seed=3):
        logits, *state = passed(*call, *state)
        expected = own(*call)
        assert torch.equal(logits, expected[0] if isinstance(expected, tuple) else expected)
    assert all(not torch.equal(cache, torch.zeros_like(cache)) for cache in state)
