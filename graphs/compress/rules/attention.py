"""Rules that keep the tokens to which the tower itself attends.

Shape suffixes: N tokens, M kept, C contextual ones, D width, A heads, T patches with the leading tokens, P patches,
K head width, G grid side of patches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graphs.compress.rules.choice import Keep

#: of the tokens that VisionZip keeps, the share that is contextual: 10 of 64 in the paper
CONTEXTUAL = 10 / 64


class ByAttention(Keep):
    """What rules by attention share: `grid` patches a side, behind `prefix` leading tokens, `window` a side a token."""

    def __init__(self, count: int, keep: int, scale: float, prefix: int, grid: int, window: int) -> None:
        super().__init__(count, keep)
        self.scale, self.prefix, self.grid, self.window = scale, prefix, grid, window

    def scores(self, query_1ATK: Tensor, key_1ATK: Tensor) -> Tensor:
        """Attention [1, N] that each visual token receives, the mean over heads and over the token's patches.

        It is paid by the class token, or by all tokens on average where the tower has none.
        """
        asking_1AQK = query_1ATK[:, :, :1] if self.prefix else query_1ATK
        paid_1AQT = (asking_1AQK @ key_1ATK.transpose(2, 3) * self.scale).softmax(-1)
        received_1P = paid_1AQT.mean((1, 2))[:, self.prefix :]
        return self.by_token(received_1P.unsqueeze(1)).flatten(1)

    def by_token(self, x_1DP: Tensor) -> Tensor:
        """Features of patches [1, D, P] averaged over each token's window: [1, D, N]."""
        if self.window == 1:
            return x_1DP
        return F.avg_pool2d(x_1DP.unflatten(2, (self.grid, self.grid)), self.window).flatten(2)


class ClsAttention(ByAttention):
    """Tokens [1, N, D] to the `keep` with the highest scores (Zhang et al., FasterVLM, arXiv 2412.01818)."""

    def forward(self, x_1ND: Tensor, query_1ATK: Tensor, key_1ATK: Tensor) -> Tensor:
        chosen_1N = self.highest(self.scores(query_1ATK, key_1ATK), self.keep)
        return torch.index_select(x_1ND, 1, self.raster(chosen_1N, self.keep))


class VisionZip(ByAttention):
    """Tokens [1, N, D] to `keep` (Yang et al., VisionZip, arXiv 2412.04467): dominant ones and contextual ones.

    Dominant tokens have the highest scores and stay as they are. Of the rest, in raster order, every so many-th is a
    contextual token; each remaining one joins the contextual token whose keys are most similar (cosine), and a
    contextual token becomes the mean of itself and those that joined it. The paper merges before the projector; here
    tokens are those behind it, and their keys the mean over their patches.
    """

    def __init__(self, count: int, keep: int, scale: float, prefix: int, grid: int, window: int) -> None:
        super().__init__(count, keep, scale, prefix, grid, window)
        self.contextual = 0 if keep == count else min(keep - 1, max(1, round(CONTEXTUAL * keep)))

    def forward(self, x_1ND: Tensor, query_1ATK: Tensor, key_1ATK: Tensor) -> Tensor:
        dominant = self.keep - self.contextual
        leading_1N = self.highest(self.scores(query_1ATK, key_1ATK), dominant)
        dominant_M = self.raster(leading_1N, dominant)
        if not self.contextual:
            return torch.index_select(x_1ND, 1, dominant_M)
        place_N1 = self.place.T
        rest = self.count - dominant
        is_dominant_N1 = (place_N1 == dominant_M[None]).any(1, keepdim=True)
        rest_R = self.raster(~is_dominant_N1.T, rest)
        context_C = rest_R[:: rest // self.contextual][: self.contextual]
        chosen_1M = torch.cat([dominant_M, context_C])[None]
        kept = torch.topk(self.count - chosen_1M, self.keep)  # descending there is ascending here
        kept_1M, takes_1M = self.count - kept.values, (kept.indices >= dominant).to(x_1ND.dtype)
        unit_ND = F.normalize(self.by_token(key_1ATK[:, :, self.prefix :].transpose(2, 3).flatten(1, 2))[0].T, dim=-1)
        likeness_NM = unit_ND @ torch.index_select(unit_ND, 0, kept_1M.flatten()).T
        # Nobody joins a dominant token, and every kept token belongs to itself: margins beyond any cosine.
        itself_NM = (place_N1 == kept_1M).to(x_1ND.dtype)
        group_N1 = (likeness_NM + 4 * takes_1M + 16 * itself_NM).argmax(1, keepdim=True)
        belongs_NM = (group_N1 == self.places(self.keep)).to(x_1ND.dtype)
        return (belongs_NM / belongs_NM.sum(0, keepdim=True)).T[None] @ x_1ND
