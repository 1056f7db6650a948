"""How much image and text positions count in the calibration loss.

A picture is many more tokens than its question, so a mean over tokens is nearly a mean over image tokens, although the
answer depends on both. MBQ (Li et al., arXiv 2412.19509) weighs the modalities by how sensitive the loss is to each,
measured by gradients; without them, `balanced` lets each modality's mean count alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphs.errors import UserError, nearest
from quant.algorithms.inputs import Inputs

RULES = ("balanced", "counts")


def modality_weights(
    counts: Mapping[str, int], rule: str = "balanced", sensitivity: Mapping[str, float] | None = None
) -> dict[str, float]:
    """What each modality's mean over its tokens counts in the whole: by modality, summing to 1.

    `rule`: `balanced` (alike, or in proportion to `sensitivity`, a mean magnitude of gradient a token, as in MBQ),
    `counts` (every token alike), or a modality's name (that one alone). Modalities without tokens count nothing.
    Raises UserError for an unknown rule, and where nothing is left to count.
    """
    seen = {name: count for name, count in counts.items() if count > 0}
    if rule not in RULES and rule not in counts:
        raise UserError(f"unknown weighting of modalities '{rule}': {nearest(rule, (*RULES, *counts))}")
    if rule == "counts":
        raw = {name: float(count) for name, count in seen.items()}
    elif rule == "balanced":
        raw = {name: 1.0 if sensitivity is None else float(sensitivity[name]) for name in seen}
    else:
        raw = {name: 1.0 for name in seen if name == rule}
    total = sum(raw.values())
    if not total > 0:
        raise UserError(f"calibration saw no tokens to weigh by '{rule}': it saw {dict(counts)}")
    return {name: raw.get(name, 0.0) / total for name in counts}


def combine(parts: Mapping[str, Inputs], weights: Mapping[str, float]) -> Inputs:
    """One layer's statistics from those of its modalities, each mean counting as `weights` say.

    A statistic that a modality with weight lacks is missing in the result; magnitudes are the largest of all.
    """
    used = [(parts[name], weight) for name, weight in weights.items() if weight > 0]

    def mean(values: list[Tensor | None]) -> Tensor | None:
        known = [value.float() for value in values if value is not None]
        if len(known) < len(used):
            return None
        return torch.stack([value * weight for value, (_, weight) in zip(known, used, strict=True)]).sum(0)

    maxima = [part.absmax_K for part, _ in used if part.absmax_K is not None]
    rows = [part.rows_RK for part, _ in used if part.rows_RK is not None]
    sampled = len(rows) == len(used)
    return Inputs(
        hessian_KK=mean([part.hessian_KK for part, _ in used]),
        square_K=mean([part.square_K for part, _ in used]),
        absmean_K=mean([part.absmean_K for part, _ in used]),
        absmax_K=torch.stack(maxima).amax(0) if len(maxima) == len(used) else None,
        rows_RK=torch.cat(rows) if sampled else None,
        row_weights_R=torch.cat([part.shares() * weight for part, weight in used]) if sampled else None,
    )
