"""Stretches of a graph, and that running by them gives what the whole graph gives, state included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from calibration import sweep
from calibration.collect import collect
from calibration.samples import zoo_samples
from calibration.sweep import Call, Sweep, ends
from graphs.model import Request, load_model
from graphs.trace import trace
from tests.tiny import tiny_program


@pytest.mark.parametrize(
    ("weights", "living", "open_state", "expected"),
    [
        ([4, 4, 4, 4], [9, 9, 9, 0], [], [1, 2, 3, 4]),  # each weight reaches the least
        ([1, 1, 1, 1, 1, 1], [9, 2, 9, 2, 9, 0], [], [4, 6]),  # the last of the places where least lives
        ([1, 1, 1, 1, 1, 1], [9, 9, 9, 2, 9, 0], [1, 3, 4], [3, 6]),  # not while state is written
        ([9, 0, 0, 0], [5, 5, 5, 0], [0, 1], [3, 4]),  # beyond the most, at the first place where it may
        ([0, 0], [1, 0], [], [2]),  # too little for a stretch of its own
    ],
)
def test_ends(weights: list[int], living: list[int], open_state: list[int], expected: list[int]) -> None:
    written = [number in open_state for number in range(len(weights))]
    assert ends(weights, living, written, least=2, most=4) == expected


@pytest.mark.parametrize("model", ["mobilevlm", "florence2", "llama3_2_vision", "qwen2_vl"])
def test_stretches_change_no_number(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of an answer that is given and a greedy one are the same to the bit if every weight is a stretch."""
    loaded = load_model(Request(model, "tiny"))
    program = trace(loaded.architecture, loaded.weights)
    given, other = zoo_samples(2, 1)
    found = []
    for limit in (sweep.LEAST_BYTES, 1):
        monkeypatch.setattr(sweep, "LEAST_BYTES", limit)
        monkeypatch.setattr(sweep, "MOST_BYTES", limit)
        found.append(collect(loaded, program, [given, replace(other, answer=None)], rows=8, decode_steps=2))
    assert len(Sweep(program, "text_decoder").stretches) > 8
    whole, parted = found
    assert whole.keys() == parted.keys()
    assert whole.origin == parted.origin
    for key, layer in whole.items():
        for modality, moments in layer.inputs.items():
            for name, value in vars(moments).items():
                other = getattr(parted[key].inputs[modality], name)
                assert value == other if value is None or isinstance(value, int) else torch.equal(value, other)


def test_state_goes_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences, stretch by stretch, against the decoder run call by call."""
    monkeypatch.setattr(sweep, "LEAST_BYTES", 1)
    monkeypatch.setattr(sweep, "MOST_BYTES", 1)
    program = tiny_program("tiny")
    width = program.methods["text_decoder"].signature.inputs[0].shape[-1]
    assert isinstance(width, int)
    generator = torch.Generator().manual_seed(0)
    sequences = [
        [
            (torch.randn(1, length, width, generator=generator), torch.arange(start, start + length))
            for start, length in row
        ]
        for row in ([(0, 5), (5, 1), (6, 1)], [(0, 3), (3, 2)])
    ]
    labels = {"text": torch.arange(1)}
    found = Sweep(program, "text_decoder").sweep([[Call(call, labels) for call in calls] for calls in sequences])
    for calls, outputs in zip(sequences, found, strict=True):
        module = program.module("text_decoder")
        for call, (logits,) in zip(calls, outputs, strict=True):
            with torch.no_grad():
                expected = module(*call)
            torch.testing.assert_close(logits, expected[0] if isinstance(expected, tuple) else expected)
