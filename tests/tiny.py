"""Small programs that many tests start from."""

from __future__ import annotations

from functools import cache

from graphs.model import Request, load_model
from graphs.program import Program
from graphs.trace import trace
from quant.recipes import recipe


@cache
def tiny_program(variant: str, recipe_name: str = "reference-fp32") -> Program:
    """A tiny MobileVLM with random weights, in a recipe's numbers. Programs are immutable, so one serves all."""
    model = load_model(Request("mobilevlm", variant))
    return recipe(recipe_name).apply(trace(model.architecture, model.weights))
