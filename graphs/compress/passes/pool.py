"""Mean pooling of the token grid behind the projector.

The plain reduction that learned projectors are measured against (Yao et al., DeCo, arXiv 2405.20985; Cai et al.,
Matryoshka Multimodal Models, arXiv 2405.17430): every factor x factor square of tokens becomes its mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.connectors.ldp import to_grid, to_tokens
from graphs.compress.base import Pass
from graphs.compress.place import tokens_out
from graphs.compress.splice import Encoder
from graphs.errors import UserError, nearest
from graphs.program import Program


class MeanPool(nn.Module):
    """Tokens [1, G*G, D] in raster order to [1, (G/factor)^2, D]."""

    def __init__(self, grid: int, factor: int) -> None:
        super().__init__()
        self.grid = grid
        self.factor = factor

    def forward(self, x_1ND: Tensor) -> Tensor:
        return to_tokens(F.avg_pool2d(to_grid(x_1ND, self.grid), self.factor))


@dataclass(frozen=True)
class Pool(Pass):
    """Each `factor` x `factor` square of image embeddings becomes their mean."""

    name = "pool"
    about = "pool{factor}: mean pooling of the token grid behind the projector"

    factor: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise UserError(f"pool: factor={self.factor} is not positive, as in factor=2")

    def run(self, program: Program) -> Program:
        encoder = Encoder.open(program)
        tokens = tokens_out(encoder.graph)
        if tokens.grid is None:
            raise UserError(
                f"pool finds no square grid of tokens: {tokens.count} tokens leave the encoder in no grid; "
                "pool before prune"
            )
        if tokens.grid % self.factor:
            divisors = [str(n) for n in range(1, tokens.grid + 1) if tokens.grid % n == 0]
            raise UserError(
                f"pool: factor={self.factor} does not divide the grid of {tokens.grid} x {tokens.grid} tokens: "
                f"{nearest(str(self.factor), divisors)}"
            )
        return encoder.splice(MeanPool(tokens.grid, self.factor), tokens.node, grid=True)


PASS = Pool
