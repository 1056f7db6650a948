"""Answers of bundles beside those of the graphs that they were lowered from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.answers import asks, compare, fault, open_session, told
from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.model import Request
from runtimes.base import Array, Caller
from runtimes.manifest import Bundle


def bundle(model: str, variant: str, out: Path) -> Bundle:
    options = ExportOptions(Request(model, variant), "onnxruntime", "reference-fp32", out=out)
    return Bundle.open(export(options, silent))


class Leaning:
    """A runtime whose decoder thinks higher of one token than it should."""

    def __init__(self, runtime: Caller, token: int) -> None:
        self.runtime, self.token = runtime, token
        self.signatures, self.version = runtime.signatures, "leaning"
        self.reset = runtime.reset

    def call(self, method: str, inputs: Any) -> list[Array]:
        given = self.runtime.call(method, inputs)
        if method == "text_decoder":
            given[0] = given[0] + 3 * np.eye(given[0].shape[-1], dtype=np.float32)[self.token]
        return given


def test_a_decoder_answers_as_its_graph_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    made = bundle("llava_1_5", "tiny", tmp_path / "b")
    rows = compare(made)
    assert [row["prompt"] for row in rows] == ["a picture", "another size", "two pictures", "no picture"]
    assert all(len(row["tokens"]) == 8 and row["relative_l2"] < 1e-5 for row in rows)
    assert len({tuple(row["tokens"]) for row in rows}) == 4
    assert fault(rows) == ""

    expected = open_session(made, "eager")
    wrong = told(replace(expected, runtime=Leaning(expected.runtime, 5)), expected, asks()[0])
    assert wrong["others"][wrong["first"]] == 5 != wrong["tokens"][wrong["first"]]
    assert 0 < wrong["lead"] < 3
    assert f"token {wrong['first']} is 5, not" in fault([*rows, wrong])


def test_scores_and_outputs_are_those_of_the_graph(tmp_path: Path) -> None:
    rows = compare(bundle("blip", "tiny-itm", tmp_path / "b"))
    calls = {row["output"]: row["calls"] for row in rows}
    assert calls["image_encoder image_embeds"] == 2
    assert calls["text_encoder text_embeds"] == 3
    assert calls["similarity cosines"] == 1
    assert calls["matching match_logits"] == 6
    assert max(row["relative_l2"] for row in rows) < 1e-5
    assert fault(rows) == ""


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"output": "similarity cosines", "relative_l2": 2e-4}, "relative L2 2.0e-04, the limit is 0.0001"),
        ({"output": "similarity cosines", "relative_l2": float("nan")}, "relative L2 nan"),
        ({"prompt": "a picture", "refused": "too long"}, "no prompt is taken: too long"),
        ({"prompt": "a picture", "tokens": [1, 2, 3], "relative_l2": 0.0}, "3 tokens fit the context, not 8"),
    ],
)
def test_faults_are_named(row: dict[str, Any], why: str) -> None:
    assert why in fault([row])
