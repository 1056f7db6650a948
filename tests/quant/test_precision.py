"""Half precision as a pass: inside fp16, outside as before, and near the original."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, Node

from export.verify import compare, program_signatures, record, seeded_inputs
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.trace import trace
from quant.recipes import recipe
from runtimes.eager import EagerRuntime


def attention(graph: Graph) -> list[Node]:
    """Everything that attention reads."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    return [argument for node in nodes for argument in node.all_input_nodes]


@pytest.mark.parametrize("variant", ["tiny", "tiny-v2"])
def test_fp16_is_inside_and_close(variant: str) -> None:
    model = load_model(Request("mobilevlm", variant))
    source = trace(model.architecture, model.weights)
    half = recipe("reference-fp16").apply(source)
    half.check()
    for name in half:
        floats = {t.dtype for t in half.methods[name].exported.state_dict.values() if t.is_floating_point()}
        assert floats == {torch.float16}
        inside = [n.meta["val"].dtype for n in attention(half.methods[name].exported.graph)]
        assert set(inside) <= {torch.float16}
    inputs = seeded_inputs(program_signatures(source))
    errors = compare(record(EagerRuntime(half), inputs), record(EagerRuntime(source), inputs))
    assert all(1e-6 < error["relative_l2"] < 1e-2 for error in errors.values())
    logits = half.module("text_decoder")(torch.randn(1, 3, 64), torch.arange(3))
    assert (logits[0] if isinstance(logits, tuple) else logits).dtype == torch.float32


def test_fp32_is_the_program_itself() -> None:
    model = load_model(Request("mobilevlm", "tiny"))
    source = trace(model.architecture, model.weights)
    assert recipe("reference-fp32").apply(source) is source


def test_unknown_recipe() -> None:
    with pytest.raises(UserError, match="did you mean 'reference-fp16'"):
        recipe("reference-fp61")
