"""Half precision as a pass: inside halves, outside as before, near the original; integers stay integers."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, Node

from export.verify import compare, program_signatures, record, seeded_inputs
from graphs import registry
from graphs.program import Signature
from graphs.rewrite import Opened
from graphs.spec import TensorSpec
from graphs.trace import trace
from quant import precision
from quant.insert import Choice, insert
from quant.layers import layers
from quant.precision import CastFloats
from quant.scheme import Scheme
from runtimes.eager import EagerRuntime
from tests.graphs.test_rewrite import Plain
from tests.tiny import tiny_program, toy_program


def attention(graph: Graph) -> list[Node]:
    """Everything that attention reads."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    return [argument for node in nodes for argument in node.all_input_nodes]


@pytest.mark.parametrize(
    ("variant", "dtype", "limit"),
    [("tiny", torch.float16, 1e-2), ("tiny-v2", torch.float16, 1e-2), ("tiny", torch.bfloat16, 5e-2)],
)
def test_inside_and_close(variant: str, dtype: torch.dtype, limit: float) -> None:
    source = tiny_program(variant)
    half = CastFloats(dtype).run(source)
    half.check()
    for name in half:
        floats = {t.dtype for t in half.methods[name].exported.state_dict.values() if t.is_floating_point()}
        assert floats == {dtype}
        inside = [n.meta["val"].dtype for n in attention(half.methods[name].exported.graph)]
        assert set(inside) <= {dtype}
    inputs = seeded_inputs(program_signatures(source))
    errors = compare(record(EagerRuntime(half), inputs), record(EagerRuntime(source), inputs))
    assert all(1e-6 < error["relative_l2"] < limit for error in errors.values())
    logits = half.module("text_decoder")(torch.randn(1, 3, 64), torch.arange(3))
    assert (logits[0] if isinstance(logits, tuple) else logits).dtype == torch.float32


def test_integers_stay() -> None:
    """Of a quantized program, scales are cast and integers are the same."""
    source = tiny_program("tiny")
    scheme = Scheme.parse("w8")

    def choice(name: str) -> Choice:
        def parts() -> dict[str, torch.Tensor]:
            weight = source.value(name)
            scale = weight.abs().amax(-1, keepdim=True) / 127
            return {"q": (weight / scale).round().to(torch.int8), "scale": scale}

        return Choice(scheme, name, parts)

    names = source.methods["text_decoder"].weight_names
    found = layers(Opened.open(source, "text_decoder"))
    full = insert(source, {("text_decoder", layer.entry): choice(names[layer.entry]) for layer in found})
    half = CastFloats(torch.float16).run(full)
    half.check()
    kept = half.methods["text_decoder"].exported.state_dict
    assert {t.dtype for name, t in kept.items() if name.endswith("_q")} == {torch.int8}
    assert {t.dtype for name, t in kept.items() if name.endswith("_scale")} == {torch.float16}
    entry = f"{found[0].entry}_q"
    assert torch.equal(half.tensor("text_decoder", entry), full.tensor("text_decoder", entry))
    inputs = seeded_inputs({"text_decoder": program_signatures(full)["text_decoder"]})
    errors = compare(record(EagerRuntime(half), inputs), record(EagerRuntime(full), inputs))
    assert 1e-6 < errors["text_decoder"]["relative_l2"] < 1e-2


def test_not_traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casting is inserting casts: tracing a large graph again takes half a minute."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(precision, "trace_module", refuse)
    half = CastFloats(torch.float16).run(tiny_program("tiny"))
    kept = {node.meta["val"].dtype for node in half.methods["text_decoder"].exported.graph.nodes if is_linear(node)}
    assert kept == {torch.float16}


def is_linear(node: Node) -> bool:
    return node.target is torch.ops.aten.linear.default


def test_a_method_without_weights() -> None:
    source = toy_program("net", Plain, Signature((TensorSpec("x", (1, 8)),), (TensorSpec("y", (1, 8)),)))
    half = CastFloats(torch.float16).run(source)
    half.check()
    softmax = half.methods["net"].exported.graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int)
    assert [node.meta["val"].dtype for node in softmax] == [torch.float16]
    inputs = seeded_inputs(program_signatures(source))
    found = compare(record(EagerRuntime(half), inputs), record(EagerRuntime(source), inputs))
    assert 0 < found["net"]["relative_l2"] < 1e-2


def test_sizes_stay_unknown() -> None:
    """Idefics2 pads its patches' mask by an operator that torch decomposes."""
    source = trace(registry.variant("idefics2", "tiny").architecture, {})
    half = CastFloats(torch.float16).run(source)
    for program in (source, half):
        exported = program.methods["vision_encoder"].exported
        values = {node.name: node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")}
        assert isinstance(values["patch_mask"].shape[1], torch.SymInt)
        assert not values["patch_mask"].shape[1].node.expr.is_number
