"""MobileVLM's lightweight downsample projectors (Chu et al., arXiv 2312.16886 and arXiv 2402.03766) for any encoder.

Both are an MLP and behind it a part that halves the side of the grid. Without weights that part is put behind the
projector that is there, whose layers then are the MLP (LLaVA's linear, GELU, linear are the very MLP of both), and it
begins as 2 x 2 mean pooling, exactly:

- version 2 pools and adds a depthwise convolution of the pooled grid, whose weights and bias begin at zero;
- version 1 ends in a norm over channels, which no weights undo: what a token's own mean and scale were is lost. So its
  two blocks carry skips, the second one's over mean pooling, and the last norm of each begins at zero. The first skip
  is the public one; the second is not, and weights trained elsewhere do without it.

Which is to say: without weights both compute what `pool{factor=2}` computes at a higher price, and are there to be
trained further. With weights the whole projector is replaced by the public one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.connectors.ldp import LDP, ChannelNorm, InvertedResidual, LDPv2, to_grid, to_tokens
from graphs.compress.base import Pass
from graphs.compress.place import PROJECTOR, Tokens, compressions, tokens_in, tokens_out
from graphs.compress.splice import Encoder
from graphs.compress.trained import trained
from graphs.errors import UserError
from graphs.program import Program

PREFIX = "mm_projector."  # what precedes a projector's keys in LLaVA's and MobileVLM's checkpoints


class Downsample(nn.Module):
    """Version 1 behind an MLP, begun as mean pooling: tokens [1, G*G, D] to [1, (G/2)^2, D]."""

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.mb_block = nn.Sequential(InvertedResidual(width, stride=1), InvertedResidual(width, stride=2))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):  # one set of values for everybody, and none that explodes
                nn.init.dirac_(part.weight, part.groups)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for block in self.mb_block:
            last = block.get_submodule("block.2.1")
            assert isinstance(last, ChannelNorm)
            nn.init.zeros_(last.weight)

    def forward(self, x_1ND: Tensor) -> Tensor:
        x_1DGG = self.mb_block[0](to_grid(x_1ND, self.grid))
        return to_tokens(F.avg_pool2d(x_1DGG, 2) + self.mb_block[1](x_1DGG))


class DownsampleV2(nn.Module):
    """Version 2 behind an MLP, begun as mean pooling: tokens [1, G*G, D] to [1, (G/2)^2, D]."""

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.peg = nn.Conv2d(width, width, 3, 1, 1, groups=width)
        nn.init.zeros_(self.peg.weight)
        assert self.peg.bias is not None
        nn.init.zeros_(self.peg.bias)

    def forward(self, x_1ND: Tensor) -> Tensor:
        x_1DPP = F.avg_pool2d(to_grid(x_1ND, self.grid), 2)
        return to_tokens(self.peg(x_1DPP) + x_1DPP)


@dataclass(frozen=True)
class Ldp(Pass):
    """Half the side of the token grid by MobileVLM's projector.

    `weights`: a safetensors file with a trained projector in MobileVLM's layout (`...mm_projector.model.mlp.1.weight`
    and so on; version 2 `...mm_projector.mlp.mlp.0.weight`); what the file holds besides is let be.
    """

    name = "ldp"
    about = "ldp{version,weights}: MobileVLM's downsampling behind the projector, or with weights in its place"

    version: Literal["1", "2"]
    weights: str | None = None

    def run(self, program: Program) -> Program:
        encoder = Encoder.open(program)
        tokens = tokens_out(encoder.graph)
        if self.weights is not None:
            return self.replace(encoder, self.weights)
        grid = even(tokens, "leave the encoder")
        with torch.random.fork_rng(devices=[]):  # layers draw weights that are then overwritten
            part = (Downsample if self.version == "1" else DownsampleV2)(tokens.width, grid)
        return encoder.splice(part.eval(), tokens.node, grid=True)

    def replace(self, encoder: Encoder, weights: str) -> Program:
        """The program with the public projector, of the file `weights`, where its own was."""
        graph = encoder.graph
        if compressions(graph):
            raise UserError("ldp with weights replaces the projector: write it before the passes that work behind it")
        _, entering = tokens_in(graph)
        leaving = tokens_out(graph)
        grid = even(entering, "enter the projector")
        kind = LDP if self.version == "1" else LDPv2
        with torch.device("meta"):
            made = (
                LDP(entering.width, leaving.width, grid)
                if self.version == "1"
                else LDPv2(entering.width, leaving.width, grid, grid // 2)
            )
        keys = {public(name, kind.KEYS): name for name in made.state_dict()}
        shapes = {key: made.state_dict()[name].shape for key, name in keys.items()}
        values = {keys[key]: value for key, value in trained(weights, shapes, PREFIX).items()}
        made.load_state_dict(values, assign=True)
        constants = encoder.attach("replacement", made.eval().requires_grad_(False))
        with graph.inserting_after(leaving.node):
            call = graph.call_module("replacement", (entering.node,))
        leaving.node.replace_all_uses_with(call)
        graph.eliminate_dead_code()
        encoder.module.delete_all_unused_submodules()
        # The new one goes by the name of the old one, by which later passes look for it.
        call.target = PROJECTOR
        encoder.module.add_module(PROJECTOR, made)
        del encoder.module.replacement
        return encoder.retrace({PROJECTOR + entry.removeprefix("replacement"): v for entry, v in constants.items()})


def even(tokens: Tokens, where: str) -> int:
    """The side of their grid, which can be halved. Raises UserError naming what fits."""
    if tokens.grid is None:
        raise UserError(f"ldp finds no square grid of tokens: {tokens.count} {where} in no grid; ldp before prune")
    if tokens.grid % 2:
        divisor = next((n for n in range(3, tokens.grid + 1) if tokens.grid % n == 0), 1)
        raise UserError(
            f"ldp cannot halve a grid of {tokens.grid} x {tokens.grid} tokens, which {where}; "
            f"the nearest that fits is pool{{factor={divisor}}}"
        )
    return tokens.grid


def public(name: str, keys: Mapping[str, str]) -> str:
    """A parameter's name behind `mm_projector.` in a public checkpoint."""
    ours = next(prefix for prefix in keys if name.startswith(prefix))
    return keys[ours] + name.removeprefix(ours)


PASS = Ldp
