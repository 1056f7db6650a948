"""Space to depth of the token grid before the projector (Chen et al., InternVL 1.5, arXiv 2404.16821).

Every factor x factor square of tokens [1, N, D] becomes one [1, N / factor^2, D * factor^2], its tokens row by row, the
channels of each together, as in the public code of Idefics 3 and of Qwen2-VL's merger. The projector then works on
fewer tokens, and its first linear layer reads wider ones.

Without trained weights that layer's weight W [H, D] is repeated factor^2 times and divided by factor^2. What leaves the
encoder then equals, up to float rounding, mean pooling of the tokens before the projector: the layer is linear, and
mean(W x_i + b) = W mean(x_i) + b. Everything behind it stays as it was traced, kernels and strides included.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from graphs.compress.base import Pass, closest
from graphs.compress.follow import Followed, FollowError, follow
from graphs.compress.place import ENTRANCE, compressions, entrances, tokens_in, tokens_out
from graphs.compress.splice import Encoder
from graphs.compress.trained import trained
from graphs.errors import UserError
from graphs.program import Constant, Program


class SpaceToDepth(nn.Module):
    """Tokens [1, G*G, D] in raster order to [1, (G/factor)^2, factor^2 * D], through four dimensions at most."""

    def __init__(self, grid: int, factor: int) -> None:
        super().__init__()
        self.side = grid // factor
        self.factor = factor

    def forward(self, x_1ND: Tensor) -> Tensor:
        rows = x_1ND.reshape(self.side, self.factor, self.side, -1)  # the last: a row of a square, factor * D
        return rows.transpose(1, 2).reshape(1, self.side**2, -1)


@dataclass(frozen=True)
class PixelShuffle(Pass):
    """Each `factor` x `factor` square of the tower's tokens becomes one wider token, before the projector.

    `weights`: a safetensors file with the first linear layer trained for it, `weight` [H, factor^2 * D] and, where that
    layer has one, `bias` [H].
    """

    name = "pixel_shuffle"
    about = "pixel_shuffle{factor,weights}: squares of tokens as one wider token before the projector"

    factor: int
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise UserError(f"pixel_shuffle: factor={self.factor} is not positive, as in factor=2")

    def run(self, program: Program) -> Program:
        encoder = Encoder.open(program)
        graph = encoder.graph
        if compressions(graph):
            raise UserError("pixel_shuffle works before the projector: write it before the passes that work behind it")
        linear, tokens = tokens_in(graph)
        if tokens.grid is None:
            raise UserError(f"pixel_shuffle finds no square grid of tokens: {tokens.count} enter the projector")
        followed = fitted(linear, tokens.grid, self.factor, tokens_out(graph).node)
        followed.apply()
        constants = self.widen(encoder, linear)
        name = f"{ENTRANCE}_{len(entrances(graph))}"
        constants |= encoder.attach(name, SpaceToDepth(tokens.grid, self.factor))
        with graph.inserting_before(linear):
            linear.update_arg(0, graph.call_module(name, (tokens.node,)))
        return encoder.retrace(constants)

    def widen(self, encoder: Encoder, linear: fx.Node) -> dict[str, Constant]:
        """Give the layer its wider weight; the values of what changes."""
        given = [node for node in linear.args[1:] if isinstance(node, fx.Node)]
        entries = dict(zip(("weight", "bias"), (str(node.target) for node in given), strict=False))
        if any(node.op != "get_attr" or len(node.users) != 1 for node in given):
            raise UserError(
                "the graph has no place for this pass: others read the weight of the projector's first layer"
            )
        shapes = {name: list(node.meta["val"].shape) for name, node in zip(entries, given, strict=True)}
        count = self.factor**2
        shapes["weight"][1] *= count
        encoder.reshape(entries["weight"], shapes["weight"])
        if self.weights is not None:
            return {entries[name]: value for name, value in trained(self.weights, shapes).items()}
        program, method, entry = encoder.program, encoder.method, entries["weight"]
        return {entry: lambda: program.tensor(method, entry).repeat(1, count) / count}


def fitted(linear: fx.Node, grid: int, factor: int, out: fx.Node) -> Followed:
    """What becomes of the graph behind `linear`. Raises UserError naming the nearest factor that fits."""
    found: dict[int, Followed] = {}
    why = f"does not divide the grid of {grid} x {grid} tokens"
    for divisor in (n for n in range(1, grid + 1) if grid % n == 0):
        side = grid // divisor
        try:
            followed = follow(linear, (1, side**2, linear.meta["val"].shape[-1]))
            if divisor > 1 and followed.shapes[out][1] >= out.meta["val"].shape[1]:
                raise FollowError(f"it gives {followed.shapes[out][1]} tokens all the same")
        except FollowError as error:
            if divisor == factor:
                why = f"leaves a grid of {side} x {side} tokens, which the projector cannot take: {error}"
        else:
            found[divisor] = followed
    if factor not in found:
        raise UserError(
            f"pixel_shuffle: factor={factor} {why}; the nearest that fits is factor={closest(factor, found)}"
        )
    return found[factor]


PASS = PixelShuffle
