"""Agreement of a runtime with the eager graph, and what counts as explained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration.samples import Sample, zoo_samples
from export.agreement import Answer, answer, compare, difference
from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.model import Request
from runtimes.manifest import Bundle
from runtimes.session import Session

SAMPLE = Sample(Image.new("RGB", (2, 2)), "?")


def logits(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_a_difference_is_explained_by_a_lead_within_the_error_only() -> None:
    expected = Answer("a", [logits(1, 0, 0), logits(0.500, 0.499, 0)])
    near = difference(SAMPLE, expected, Answer("b", [logits(1, 0, 0), logits(0.499, 0.500, 0)]), limit=1e-2)
    assert near is not None
    assert near.explained
    assert near.margin == pytest.approx(0.001, rel=1e-3)
    far = difference(SAMPLE, Answer("a", [logits(1, 0, 0)]), Answer("b", [logits(0.4, 0.45, 0)]), limit=1e-2)
    assert far is not None
    assert not far.explained
    assert difference(SAMPLE, expected, Answer("a"), limit=1e-2) is None
    unknown = difference(SAMPLE, expected, Answer("b"), limit=1e-4)
    assert unknown is not None
    assert not unknown.explained


def test_onnxruntime_answers_as_eager(tmp_path: Path) -> None:
    samples = list(zoo_samples(21, seed=5))
    bundle = Bundle.open(export(ExportOptions(Request("mobilevlm"), "onnxruntime", out=tmp_path / "b"), silent))
    eager, lowered = (
        [answer(session, sample) for sample in samples]
        for session in (Session.open(bundle, "eager"), Session.open(bundle))
    )
    found = compare(samples, eager, lowered, limit=1e-4)
    assert found["same"] + found["explained"] == 21
    assert sum(a.text == s.answer for a, s in zip(eager, samples, strict=True)) >= 14
