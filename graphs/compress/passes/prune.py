"""Training-free pruning of image embeddings to a fixed number, by a choice of rules (`graphs.compress.rules`).

cdpruner: arXiv 2506.10967; cls_attention: arXiv 2412.01818; divprune: arXiv 2503.02175; tome: arXiv 2210.09461;
visionzip: arXiv 2412.04467; random and uniform are the controls that they are to be reported beside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn

from graphs.compress.base import Pass
from graphs.compress.place import Tokens, tokens_out, tower_attention
from graphs.compress.rules.attention import ByAttention, ClsAttention, VisionZip
from graphs.compress.rules.cdpruner import CDPruner
from graphs.compress.rules.controls import random, uniform
from graphs.compress.rules.divprune import DivPrune
from graphs.compress.rules.tome import ToMe
from graphs.compress.splice import Encoder
from graphs.errors import UserError
from graphs.program import Program

Method = Literal["cdpruner", "cls_attention", "divprune", "random", "tome", "uniform", "visionzip"]

#: a rule's module and what it reads besides the tokens
Made = tuple[nn.Module, tuple[fx.Node, ...]]


@dataclass(frozen=True)
class Prune(Pass):
    """Keep `keep` image embeddings, in raster order; `seed` is that of `random`."""

    name = "prune"
    about = "prune{keep,method,seed}: tokens by cdpruner, cls_attention, divprune, visionzip, tome, random, uniform"

    keep: int
    method: Method = "divprune"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"prune: keep={self.keep} is not positive, as in keep=18")

    def run(self, program: Program) -> Program:
        encoder = Encoder.open(program)
        tokens = tokens_out(encoder.graph)
        if self.keep > tokens.count:
            raise UserError(f"prune: keep={self.keep} is more than the {tokens.count} tokens there are")
        rule, more = RULES[self.method](self, encoder.graph, tokens)
        return encoder.splice(rule, tokens.node, more, grid=False)


def by_attention(rule: type[ByAttention]) -> Callable[[Prune, fx.Graph, Tokens], Made]:
    """A rule that reads the tower's attention, which must lie over the tokens as a grid over a finer one."""

    def make(options: Prune, graph: fx.Graph, tokens: Tokens) -> Made:
        attention = tower_attention(graph)
        if tokens.grid is None or attention.grid % tokens.grid:
            raise UserError(
                f"prune: {options.method} cannot lay the tower's {attention.grid} x {attention.grid} patches over "
                f"{tokens.count} tokens: use method=divprune, or prune only once"
            )
        window = attention.grid // tokens.grid
        made = rule(tokens.count, options.keep, attention.scale, attention.prefix, attention.grid, window)
        return made, (attention.query, attention.key)

    return make


RULES: dict[str, Callable[[Prune, fx.Graph, Tokens], Made]] = {
    "cdpruner": by_attention(CDPruner),
    "cls_attention": by_attention(ClsAttention),
    "divprune": lambda options, graph, tokens: (DivPrune(tokens.count, options.keep), ()),
    "random": lambda options, graph, tokens: (random(tokens.count, options.keep, options.seed), ()),
    "tome": lambda options, graph, tokens: (ToMe(tokens.count, options.keep), ()),
    "uniform": lambda options, graph, tokens: (uniform(tokens.count, options.keep), ()),
    "visionzip": by_attention(VisionZip),
}

PASS = Prune
