"""Every so-many-th visual token, of pictures of any number of them."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from graphs.compress.base import apply, parse
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.program import Program
from graphs.spec import Dim
from graphs.trace import trace
from runtimes.eager import EagerRuntime


@cache
def traced(model: str) -> Program:
    loaded = load_model(Request(model, "tiny"))
    return trace(loaded.architecture, loaded.weights)


@pytest.mark.parametrize("model", ["pixtral", "idefics2"])
@pytest.mark.parametrize("factor", [2, 3])
def test_what_stays_is_what_was(model: str, factor: int) -> None:
    program = traced(model)
    thinned = apply(parse(f"thin{{factor={factor}}}"), program)
    method = thinned.methods["vision_encoder"].signature.method("vision_encoder")
    before, after = EagerRuntime(program), EagerRuntime(thinned)
    for length in (5, 7, 12):
        arrays = [tensor.numpy() for tensor in next(method.examples(lengths=(length,)))]
        (whole,), (rest,) = (runtime.call("vision_encoder", arrays) for runtime in (before, after))
        assert np.array_equal(rest, whole[:, ::factor])


def test_the_signature_says_how_many_stay() -> None:
    program = traced("pixtral")
    count = program.methods["vision_encoder"].signature.outputs[0].shape[1]
    assert isinstance(count, Dim)
    signature = apply(parse("thin{factor=4}"), program).methods["vision_encoder"].signature
    assert signature.outputs[0].shape[1] == Dim("kept_tokens", 2, (count.max + 3) // 4)
    assert {dim.min for dim in signature.inputs[0].dims} == {5}
    fixed = apply(parse("thin{factor=2}"), traced("idefics2")).methods["vision_encoder"].signature
    assert fixed.outputs[0].shape == (1, 13, 64)


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"changes from picture to picture.*thin\{factor=2\}"):
        apply(parse("prune{keep=4}"), traced("pixtral"))
    with pytest.raises(UserError, match="looked for image_embeds alone, found cross_keys"):
        apply(parse("thin{factor=2}"), traced("llama3_2_vision"))
    with pytest.raises(UserError, match=r"thin goes in once: write thin\{factor=4\}"):
        apply(parse("thin{factor=2};thin{factor=2}"), traced("pixtral"))
    with pytest.raises(UserError, match="factor=25 leaves less than two of the 25"):
        apply(parse("thin{factor=25}"), traced("idefics2"))
    with pytest.raises(UserError, match="factor=0 is not positive"):
        parse("thin{factor=0}")


def test_a_fixed_number_is_pruned_without_a_projector() -> None:
    pruned = apply(parse("prune{keep=12}"), traced("idefics2"))
    assert pruned.methods["vision_encoder"].signature.outputs[0].shape == (1, 12, 64)
    with pytest.raises(UserError, match="no square grid"):
        apply(parse("pool{factor=5}"), traced("idefics2"))
