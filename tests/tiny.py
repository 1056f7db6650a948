"""Small programs that many tests start from."""

from __future__ import annotations

from functools import cache

import torch

from graphs.model import Request, load_model
from graphs.program import Program
from graphs.trace import trace
from quant.precision import CastFloats


@cache
def tiny_program(variant: str, floats: str = "float32") -> Program:
    """A tiny MobileVLM with random weights, kept in `floats`. Programs are immutable, so one serves all."""
    model = load_model(Request("mobilevlm", variant))
    program = trace(model.architecture, model.weights)
    return program if floats == "float32" else CastFloats(getattr(torch, floats)).run(program)
