"""Logits of the last token alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.pipeline import ExportOptions, export
from export.stages import silent
from export.verify import program_signatures, record, seeded_inputs
from graphs.compress.base import apply, parse
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.program import Program
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.manifest import Bundle
from runtimes.session import Session


def traced(model: str, variant: str = "tiny") -> Program:
    loaded = load_model(Request(model, variant))
    return trace(loaded.architecture, loaded.weights)


@pytest.mark.parametrize(
    "model", ["mobilevlm", "paligemma2", "florence2"]
)  # a plain head, one under a cap, with a bias
def test_they_are_those_of_the_whole(model: str) -> None:
    source = traced(model)
    changed = apply(parse("last_logits"), source)
    given = {"text_decoder": seeded_inputs(program_signatures(source))["text_decoder"]}
    before, after = (record(EagerRuntime(program), given)["text_decoder"] for program in (source, changed))
    assert max(call.outputs[0].shape[1] for call in before) > 1
    for old, new in zip(before, after, strict=True):
        assert new.outputs[0].shape == (1, 1, old.outputs[0].shape[2])
        np.testing.assert_allclose(new.outputs[0][0, 0], old.outputs[0][0, -1], rtol=0, atol=1e-5)
    assert changed.methods["text_decoder"].signature.outputs[0].shape[1] == 1


def test_it_goes_in_once_and_only_where_there_is_a_head() -> None:
    with pytest.raises(UserError, match="no place for last_logits"):
        apply(parse("last_logits;last_logits"), traced("mobilevlm"))
    with pytest.raises(UserError, match="no method 'text_decoder'"):
        apply(parse("last_logits"), traced("clip"))


def test_answers_stay(tmp_path: Path) -> None:
    options = ExportOptions(Request("mobilevlm"), "executorch", compress="last_logits", out=tmp_path / "b")
    bundle = Bundle.open(export(options, silent))
    plain = Session.open(bundle, "eager")
    assert Session.open(bundle).answer("What is this?", [])[0] == plain.answer("What is this?", [])[0]
