"""Controls that every other rule is to be reported beside: tokens kept without a look at the picture."""

from __future__ import annotations

import torch

from graphs.compress.rules.choice import KeepConstant


def uniform(count: int, keep: int) -> KeepConstant:
    """Evenly spaced in raster order: the middle of each of `keep` equal stretches."""
    return KeepConstant((2 * torch.arange(keep) + 1) * count // (2 * keep))


def random(count: int, keep: int, seed: int) -> KeepConstant:
    """Drawn once, when compiling, from `seed`."""
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:keep]
    return KeepConstant(drawn.sort().values)
