"""A traced vision encoder opened for change: new computation on its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import fx, nn

from graphs.compress.place import COMPRESSION, GRID, LIST, compressions
from graphs.program import Program
from graphs.rewrite import Opened
from graphs.spec import TensorSpec

METHOD = "vision_encoder"


class Encoder(Opened):
    """A program whose `vision_encoder` lies open."""

    @classmethod
    def open(cls, program: Program, method: str = METHOD) -> Self:
        """Raises UserError where the program has no vision encoder."""
        return super().open(program, method)

    def splice(
        self,
        rule: nn.Module,
        tokens: fx.Node,
        more: Sequence[fx.Node] = (),
        *,
        grid: bool,
        inputs: tuple[TensorSpec, ...] | None = None,
    ) -> Program:
        """The program with rule(tokens, *more) [1, M, D] where `tokens` [1, N, D] were used.

        `rule` is on real tensors; its buffers become constants of the program. `grid`: whether its tokens are a square
        in raster order. `inputs`: those that the method takes from now on, where they change.
        """
        name = f"{COMPRESSION}_{len(compressions(self.graph))}_{GRID if grid else LIST}"
        constants = self.attach(name, rule)
        last = max((tokens, *more), key=list(self.graph.nodes).index)
        with self.graph.inserting_after(last):
            call = self.graph.call_module(name, (tokens, *more))
        tokens.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
        return self.retrace(constants, inputs)
