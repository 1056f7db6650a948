"""Every `factor`-th image embedding in the order that the prompt reads them, for pictures of any number of tokens.

Rules that choose by content keep a number of tokens that is fixed when they are compiled; where pictures have as many
tokens as they are large (tilings, native resolution, videos), taking them at even distances is what can be fixed. It is
also the control that other rules are to be reported beside (as in DivPrune, arXiv 2503.02175). The rule works on tokens
wherever they come from; `graphs.dialogue` gives those that stay the places and the positions that they had.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from graphs.compress.base import Pass
from graphs.compress.splice import METHOD, Encoder
from graphs.errors import UserError
from graphs.program import Program
from graphs.spec import Dim, TensorSpec

OUTPUT = "image_embeds"
#: the dimension of those that stay
KEPT = "kept_tokens"


class Stride(nn.Module):
    """Tokens [1, N, D] to [1, ceil(N / factor), D]."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x_1ND: Tensor) -> Tensor:
        return x_1ND[:, :: self.factor]


@dataclass(frozen=True)
class Thin(Pass):
    """Keep the first of every `factor` image embeddings."""

    name = "thin"
    about = "thin{factor}: every so-many-th image embedding, also where their number changes from picture to picture"

    factor: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise UserError(f"thin: factor={self.factor} is not positive, as in factor=2")

    def run(self, program: Program) -> Program:
        encoder = Encoder.open(program)
        signature = program.methods[METHOD].signature
        if [spec.name for spec in signature.outputs] != [OUTPUT]:
            given = ", ".join(spec.name for spec in signature.outputs)
            raise UserError(f"the graph has no place for this pass: looked for {OUTPUT} alone, found {given}")
        count = signature.outputs[0].shape[1]
        if isinstance(count, Dim) and count.name == KEPT:
            raise UserError("thin goes in once: write thin{factor=4} for thin{factor=2} twice")
        if self.factor >= (most := count.max if isinstance(count, Dim) else count):
            raise UserError(
                f"thin: factor={self.factor} leaves less than two of the {most} tokens there are at the most"
            )
        if not isinstance(count, Dim):
            return encoder.splice(Stride(self.factor), last(encoder), grid=False)
        # two tokens must stay at the least: tracing takes a size of one for a constant
        least = max(count.min, self.factor + 1)
        inputs = tuple(raised(spec, count.name, least) for spec in signature.inputs)
        traced = encoder.splice(Stride(self.factor), last(encoder), grid=False, inputs=inputs).methods[METHOD]
        kept = Dim(KEPT, -(-least // self.factor), -(-count.max // self.factor))
        output = replace(signature.outputs[0], shape=(1, kept, signature.outputs[0].shape[2]))
        return program.replace(METHOD, replace(traced, signature=replace(traced.signature, outputs=(output,))))


def last(encoder: Encoder) -> fx.Node:
    """What the encoder gives."""
    return encoder.graph.output_node().all_input_nodes[0]


def raised(spec: TensorSpec, name: str, least: int) -> TensorSpec:
    """`spec` with at least so many of the dimension called `name`."""
    shape = tuple(replace(d, min=least) if isinstance(d, Dim) and d.name == name else d for d in spec.shape)
    return replace(spec, shape=shape)


PASS = Thin
