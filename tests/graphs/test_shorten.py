"""A program without some of its layers computes what the model without them does."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from graphs.model import Request, load_model
from graphs.program import Program, Signature
from graphs.shorten import operators, shorten, superfluous
from graphs.spec import TensorSpec
from graphs.trace import trace
from quant.apply import Quantization
from quant.recipe import Recipe, Rule
from quant.resolve import resolve
from runtimes.eager import EagerRuntime
from tests.tiny import toy_program


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


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.mlp(x))


class Staged(nn.Module):
    """Two stages, no two of whose modules are alike, each a stack of three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*(Block(width) for _ in range(3))) for width in (8, 16))
        self.widen = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.stages
        return second(self.widen(first(x)))


def test_stacks_within_stages() -> None:
    shape, out = TensorSpec("x", (1, 3, 8)), TensorSpec("y", (1, 3, 16))
    program = toy_program("net", Staged, Signature((shape,), (out,)))
    left = superfluous(program)
    assert left == {"net": ("stages.0.0", "stages.0.2", "stages.1.0", "stages.1.2")}
    short = shorten(program, left)
    module = Staged()
    module.load_state_dict({name: program.tensor("net", name) for name in module.state_dict()})
    for stage in module.stages:
        kept = stage[1]
        stage._modules.clear()
        stage._modules["1"] = kept
    given = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    (mine,) = EagerRuntime(short).call("net", [given.numpy()])
    assert torch.allclose(torch.from_numpy(mine), module(given), atol=1e-6)
