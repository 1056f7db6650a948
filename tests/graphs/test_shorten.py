"""A program without some of its layers computes what the model without them does."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from graphs.model import Request, load_model
from graphs.program import Program
from graphs.shorten import operators, shorten, superfluous
from graphs.trace import trace
from quant.apply import Quantization
from quant.recipe import Recipe, Rule
from quant.resolve import resolve
from runtimes.eager import EagerRuntime


@cache
def nano() -> tuple[nn.Module, Program]:
    model = load_model(Request("mobilevlm"))
    program = trace(model.architecture, model.weights)
    root = model.architecture.build().eval().requires_grad_(False)
    root.load_state_dict({**dict(root.state_dict()), **{n: model.weights[n] for n in model.weights}})
    return root, program


def test_one_layer_of_each_stack_stays() -> None:
    _, program = nano()
    left = superfluous(program)
    assert left == {
        "vision_encoder": ("tower.layers.0", "tower.layers.1", "tower.layers.3"),
        "token_embedding": (),
        "text_decoder": ("layers.0", "layers.1", "layers.3"),
    }
    short = shorten(program, left)
    short.check()
    assert short.methods["token_embedding"] is program.methods["token_embedding"]
    assert operators(short, "text_decoder")["aten.linear.default"] == 7 + 1
    assert [spec.name for spec in short.methods["text_decoder"].signature.state] == [
        "layers.2.cache.k",
        "layers.2.cache.v",
    ]
    held = short.methods["vision_encoder"].exported.state_dict
    assert {name.split(".")[2] for name in held if name.startswith("tower.layers.")} == {"2"}


def test_it_computes_the_model_without_those_layers() -> None:
    root, program = nano()
    short = EagerRuntime(shorten(program, superfluous(program)))
    model = load_model(Request("mobilevlm"))
    for method in model.architecture.methods(root):
        for stack in [m for m in method.module.modules() if isinstance(m, nn.ModuleList) and len(m) > 3]:
            kept = stack[2]
            stack._modules.clear()
            stack._modules["0"] = kept
    for method in model.architecture.methods(root):
        signature = program.methods[method.name].signature
        for call in signature.method(method.name).examples(seed=1):
            with torch.no_grad():
                expected = method.module(*call)
            (found,) = short.call(method.name, [tensor.numpy() for tensor in call])
            assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)


def test_layers_in_other_numbers_are_of_another_kind() -> None:
    from export.targets.base import load_target

    _, program = nano()
    rules = (Rule("text_decoder/layers.0*", ("w8",)), Rule("text_decoder/layers*", ("w4g32",)))
    table = load_target("onnxruntime").capabilities
    resolved = resolve(Recipe("test", "", "float32", ("float",), "balanced", rules), program, "onnxruntime", table)
    quantized = Quantization(resolved, None).apply(program)
    assert superfluous(quantized)["text_decoder"] == ("layers.1", "layers.3")
    short = shorten(quantized, superfluous(quantized))
    assert operators(short, "text_decoder")["vlmx.dequantize.default"] == 14
    assert len([n for n in short.methods["text_decoder"].weight_names.values() if n.endswith(".q")]) == 14


def test_a_layer_that_cannot_be_left_out_is_named() -> None:
    with pytest.raises(KeyError, match=r"layers\.9"):
        shorten(nano()[1], {"text_decoder": ("layers.9",)})
