"""DivPrune (Alvar et al., arXiv 2503.02175): the tokens whose smallest distance to one another is greedily largest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graphs.compress.rules.choice import Keep


class DivPrune(Keep):
    """Tokens [1, N, D] to [1, keep, D].

    Distance is one minus cosine similarity. The first token is the one farthest from its nearest neighbour; each next
    one is the farthest from its nearest among those kept. The loop is unrolled: three operators a token.
    """

    def forward(self, x_1ND: Tensor) -> Tensor:
        unit_ND = F.normalize(x_1ND[0], dim=-1)
        distance_NN = 1 - unit_ND @ unit_ND.T
        # A distance of -4 to itself marks a token as kept and never lets it win again.
        itself_NN = (self.place == self.place.T).to(x_1ND.dtype)
        distance_NN = distance_NN * (1 - itself_NN) - 4 * itself_NN
        score_1N = torch.topk(distance_NN, min(2, self.count), dim=0, largest=False).values[-1:]
        nearest_1N: Tensor | None = None
        for _ in range(self.keep):
            found_1N = torch.index_select(distance_NN, 0, score_1N.argmax(dim=1))
            nearest_1N = found_1N if nearest_1N is None else torch.minimum(nearest_1N, found_1N)
            score_1N = nearest_1N
        return torch.index_select(x_1ND, 1, self.raster(score_1N < -2, self.keep))
