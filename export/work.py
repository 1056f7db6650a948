"""What the calls of a model compute, counted on fake tensors: operations of each layer, its weights, the state read.

Multiply-adds count as two operations. Products of activations with each other (attention) are counted apart from those
with weights, since they are computed in other numbers. Encoders whose pictures vary in size are counted at the largest
picture that they take.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from graphs.dialogue import DECODER, ENCODER, VISION
from graphs.spec import Architecture, Method, TensorSpec
from graphs.trace import build_fake
from quant.layers import Kind, Weighed

#: function -> the kind of layer that it computes, and which argument is its weight
FUNCTIONS: dict[Callable[..., object], tuple[Kind, int]] = {
    F.linear: ("linear", 1),
    F.conv2d: ("conv", 1),
    F.embedding: ("embedding", 1),
}

ENCODERS = (VISION, "image_encoder")


class Watch(TorchFunctionMode):
    """Keeps, by the identity of each weight, the kind of layer that it belongs to and the operations done with it."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter
        self.kinds: dict[int, Kind] = {}
        self.flops: dict[int, int] = defaultdict(int)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in FUNCTIONS:
            return func(*args, **(kwargs or {}))
        kind, place = FUNCTIONS[func]
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        self.kinds[id(args[place])] = kind
        self.flops[id(args[place])] += self.counter.get_total_flops() - before
        return result


@dataclass(frozen=True)
class Weight:
    """A parameter: `key` is its identity, which methods that share it have in common."""

    key: int
    numel: int
    layer: Weighed | None  # None: it belongs to none that a scheme could be given to
    flops: int


@dataclass(frozen=True)
class Call:
    """One call of a method. `attention`: operations on activations alone; `state`: what is read of it."""

    method: str
    weights: tuple[Weight, ...]
    attention: int
    state: tuple[TensorSpec, ...]

    @property
    def flops(self) -> int:
        return self.attention + sum(weight.flops for weight in self.weights)


@dataclass(frozen=True)
class Lengths:
    """What the dynamic dimensions of a call stand for: tokens of a question, and of the prompt that it makes."""

    question: int
    prompt: int
    pictures: int | None = None  # keys of one picture, where it is read by cross-attention alone

    def of(self, method: str, spec: TensorSpec, call: int) -> dict[str, int]:
        """Sizes of an input's dynamic dimensions; `call`: the tokens that a decoder is given."""
        sizes = {}
        for dim in spec.dims:
            length = self.question
            if method in ENCODERS and not spec.name.endswith("input_ids"):
                length = dim.max
            elif method == ENCODER:
                length = self.prompt
            elif method == DECODER:
                length = call if dim.name == "sequence" else self.pictures or self.prompt
            sizes[dim.name] = max(dim.min, min(dim.max, length))
        return sizes


@dataclass(frozen=True)
class Work:
    """The calls of an architecture by how they are shown."""

    calls: Mapping[str, Call]
    deployed: int  # parameters that any method reads or holds


def count(architecture: Architecture, lengths: Lengths) -> Work:
    """Every call of a dialogue, by the architecture's own modules; no weight is read."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    root = build_fake(architecture, mode)
    methods = architecture.methods(root)
    encoded = any(method.name == ENCODER for method in methods)
    calls = {
        shown: counted(method, mode, lengths, tokens)
        for method in methods
        for shown, tokens in shown_calls(method, lengths.prompt, encoded).items()
    }
    return Work(calls, sum(parameter.numel() for parameter in root.parameters()))


def shown_calls(method: Method, prompt: int, encoded: bool) -> dict[str, int]:
    """The calls that are counted, by how they are shown, with the tokens that a decoder is given."""
    if method.state:
        prefill = {} if encoded else {f"{method.name} (prefill {prompt})": prompt}
        return {**prefill, f"{method.name} (one token)": 1}
    varies = method.name in ENCODERS and any(
        not spec.name.endswith("input_ids") and spec.dims for spec in method.inputs
    )
    return {f"{method.name} (largest picture)" if varies else method.name: 1}


def counted(method: Method, mode: FakeTensorMode, lengths: Lengths, tokens: int) -> Call:
    """One call of a method with `tokens` tokens for a decoder."""
    counter = FlopCounterMode(display=False)
    watch = Watch(counter)
    with mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernel on CPUs is not counted
        inputs = [
            torch.zeros(spec.size(lengths.of(method.name, spec, tokens)), dtype=spec.dtype) for spec in method.inputs
        ]
        with counter, watch:
            method.module(*inputs)
    weights = []
    for entry, parameter in method.module.named_parameters():
        key = id(parameter)
        kind = watch.kinds.get(key)
        layer = Weighed(method.name, entry, kind, tuple(parameter.shape)) if kind else None
        weights.append(Weight(key, parameter.numel(), layer, watch.flops[key]))
    total = counter.get_total_flops()
    return Call(method.name, tuple(weights), total - sum(weight.flops for weight in weights), method.state)
