"""What one layer read and wrote on calibration data, its inputs by modality.

Positions of an image and of text differ in magnitude and sensitivity, so they are kept apart and an algorithm weighs
them after the fact (MBQ, arXiv 2412.19509, weighs the calibration loss by modality).

Shape suffixes in words: K inputs of a layer (of a convolution: its input channels), O outputs, R kept rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from graphs.errors import UserError, nearest

#: how modalities are weighed against each other; or a share for each, by name
Weighting = str | Mapping[str, float]
WEIGHTINGS = ("counts", "balanced", "image", "text")
MODALITIES = ("image", "text")

Key = tuple[str, str]  # method, the name of the layer's weight in that method's state dict


@dataclass(frozen=True)
class Moments:
    """One modality's inputs of a layer, over `count` positions, all float32.

    `minimum`, `maximum`, `sum_abs`, `sum_square`: [K]. `hessian`: sum of x x^T, [K, K], None where it was not asked for
    and for convolutions. `rows`: a uniform sample of the inputs in random order, [R, K].
    """

    count: int
    minimum: Tensor
    maximum: Tensor
    sum_abs: Tensor
    sum_square: Tensor
    hessian: Tensor | None
    rows: Tensor


@dataclass(frozen=True)
class Outputs:
    """A layer's outputs over all modalities, float32: `minimum` and `maximum` [O], a uniform sample `rows` [R, O]."""

    minimum: Tensor
    maximum: Tensor
    rows: Tensor

    @property
    def low(self) -> float:
        return float(self.minimum.min())

    @property
    def high(self) -> float:
        return float(self.maximum.max())


@dataclass(frozen=True)
class Combined:
    """Inputs of a layer with each modality given a share; `parts` holds (share, moments), the shares sum to 1.

    Means are over positions: within a modality all weigh the same. Extremes are over all parts, whatever their share.
    """

    parts: tuple[tuple[float, Moments], ...]

    @property
    def count(self) -> int:
        """Positions seen."""
        return sum(moments.count for _, moments in self.parts)

    @cached_property
    def hessian(self) -> Tensor | None:
        """Mean of x x^T, float32 [K, K]; None where it was not collected."""
        found = [(share / m.count, m.hessian) for share, m in self.parts if m.hessian is not None]
        if not found:
            return None
        (scale, first), *others = found
        total = scale * first
        for scale, hessian in others:  # in place: each is as large as what a layer's weight is in floats, or larger
            total.add_(hessian, alpha=scale)
        return total

    @property
    def absmean(self) -> Tensor:
        """Mean of |x|, float32 [K]."""
        return torch.stack([share / m.count * m.sum_abs for share, m in self.parts]).sum(0)

    @property
    def mean_square(self) -> Tensor:
        """Mean of x^2, float32 [K]."""
        return torch.stack([share / m.count * m.sum_square for share, m in self.parts]).sum(0)

    @property
    def minimum(self) -> Tensor:
        """Float32 [K]."""
        return torch.stack([m.minimum for _, m in self.parts]).amin(0)

    @property
    def maximum(self) -> Tensor:
        """Float32 [K]."""
        return torch.stack([m.maximum for _, m in self.parts]).amax(0)

    @property
    def absmax(self) -> Tensor:
        """Largest |x|, float32 [K]."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    @property
    def low(self) -> float:
        return float(self.minimum.min())

    @property
    def high(self) -> float:
        return float(self.maximum.max())

    @cached_property
    def rows(self) -> Tensor:
        """As many sampled inputs as allow each modality its share of them, float32 [R, K]."""
        total = min(len(m.rows) / share for share, m in self.parts)
        return torch.cat([m.rows[: max(1, round(share * total))] for share, m in self.parts])


@dataclass(frozen=True)
class LayerStatistics:
    """A layer's inputs by modality ("image", "text": those that it saw) and its outputs.

    Layers that read the same value have the identical `inputs` object.
    """

    inputs: Mapping[str, Moments]
    outputs: Outputs

    def combined(self, weighting: Weighting = "counts") -> Combined:
        """The modalities weighed against each other.

        "counts": by their numbers of positions, as the data has them; "balanced": each the same; "image" or "text":
        that one alone; a mapping: in proportion to its values. A layer that saw none of the modalities that are given
        a share (a vision layer, under "text") has "counts". Raises UserError for an unknown weighting.
        """
        counts: dict[str, float] = {name: moments.count for name, moments in self.inputs.items()}
        if isinstance(weighting, str):
            if weighting not in WEIGHTINGS:
                raise UserError(f"unknown weighting of modalities '{weighting}': {nearest(weighting, WEIGHTINGS)}")
            weighting = {"counts": counts, "balanced": dict.fromkeys(counts, 1.0)}.get(weighting, {weighting: 1.0})
        if any(not 0 <= value < float("inf") for value in weighting.values()):
            raise UserError(f"modalities cannot be weighed by {dict(weighting)}: give each a share of 0 or more")
        shares = {name: weighting[name] for name in counts if weighting.get(name, 0) > 0} or counts
        total = sum(shares.values())
        return Combined(tuple((share / total, self.inputs[name]) for name, share in shares.items()))
