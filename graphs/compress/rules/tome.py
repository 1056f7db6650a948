"""Token Merging (Bolya et al., ToMe, arXiv 2210.09461) by bipartite soft matching, applied behind the projector.

Shape suffixes: N tokens of a round, A every other one of them, M those that remain, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graphs.compress.rules.choice import Keep


class ToMe(Keep):
    """Tokens [1, N, D] to [1, keep, D], each the mean of all tokens that were merged into it.

    A round splits tokens into even and odd places; each even one finds the odd one most like it (cosine), and the pairs
    most alike merge, at most half of the tokens a round. The paper matches by a layer's keys, one round a layer; here
    rounds follow one another, on the tokens themselves.
    """

    def forward(self, x_1ND: Tensor) -> Tensor:
        x_ND, count = x_1ND[0], self.count
        size_N1 = torch.ones_like(x_ND[:, :1])
        while count > self.keep:
            merged = min(count // 2, count - self.keep)
            belongs_NM = self.round(x_ND, count, merged).to(x_ND.dtype)
            total_M1 = belongs_NM.T @ size_N1
            x_ND = (belongs_NM.T @ (x_ND * size_N1)) / total_M1
            size_N1, count = total_M1, count - merged
        return x_ND[None]

    def round(self, x_ND: Tensor, count: int, merged: int) -> Tensor:
        """Which token [N] of a round becomes part of which that remains [M], as bool."""
        place_N1 = self.places(count).T
        unit_ND = F.normalize(x_ND, dim=-1)
        likeness_AB = unit_ND[::2] @ unit_ND[1::2].T
        best_A1, found_A1 = likeness_AB.max(1, keepdim=True)
        joining_J = 2 * self.raster(self.highest(best_A1.T, merged), merged)
        joins_N1 = (place_N1 == joining_J[None]).any(1, keepdim=True)
        remain_M = self.raster(~joins_N1.T, count - merged)
        partner_A1, pairs = 2 * found_A1 + 1, count // 2
        partner_N1 = torch.stack([partner_A1[:pairs], place_N1[1::2]], dim=1).reshape(-1, 1)
        if count % 2:
            partner_N1 = torch.cat([partner_N1, partner_A1[pairs:]])
        return torch.where(joins_N1, partner_N1, place_N1) == remain_M[None]
