"""Small programs that many tests start from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphs.model import Request, load_model
from graphs.program import Program, Signature, TracedMethod
from graphs.trace import trace, trace_module
from quant.precision import CastFloats


@cache
def tiny_program(variant: str, floats: str = "float32") -> Program:
    """A tiny MobileVLM with random weights, kept in `floats`. Programs are immutable, so one serves all."""
    model = load_model(Request("mobilevlm", variant))
    program = trace(model.architecture, model.weights)
    return program if floats == "float32" else CastFloats(getattr(torch, floats)).run(program)


def toy_program(name: str, make: Callable[[], nn.Module], signature: Signature) -> Program:
    """A module with seeded random weights as the only method of a program."""
    torch.manual_seed(0)
    weights = dict(make().requires_grad_(False).state_dict())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        module = make().eval().requires_grad_(False)
    exported = trace_module(module, signature.inputs, mode)
    states = {spec.name for spec in signature.state}
    return Program({name: TracedMethod(signature, exported, {n: n for n in weights if n not in states})}, weights, {})
