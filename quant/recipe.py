"""Recipes: what each number of a deployed program is kept in, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphs.errors import UserError, nearest
from graphs.program import Program
from quant.precision import CastFloats


@dataclass(frozen=True)
class Recipe:
    """A named choice; `floats` is the dtype of weights, activations and state inside the graph."""

    name: str
    floats: torch.dtype
    about: str

    def apply(self, program: Program) -> Program:
        """The program in this recipe's numbers; its inputs and outputs keep their dtypes."""
        return program if self.floats == torch.float32 else CastFloats(self.floats).run(program)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("reference-fp32", torch.float32, "single precision throughout"),
        Recipe("reference-fp16", torch.float16, "half precision weights, activations and cache; float32 in and out"),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises UserError naming the nearest one."""
    if name not in RECIPES:
        raise UserError(f"unknown recipe '{name}': {nearest(name, RECIPES)}")
    return RECIPES[name]
