"""CDPruner (Zhang et al., arXiv 2506.10967): the tokens most diverse under the condition that they matter.

Shape suffixes: N tokens, D width, A heads, T patches with the leading tokens, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graphs.compress.rules.attention import ByAttention

#: the least of relevance, and of what is left of a token's own direction: neither may be zero
LEAST = 1e-6


class CDPruner(ByAttention):
    """Tokens [1, N, D] to [1, keep, D]: greedy inference of a determinantal point process.

    Its kernel is the tokens' cosine similarity, each side times the token's relevance, scaled to 0..1. The paper takes
    relevance from the question, which nobody knows when a graph is compiled for any: here it is the attention of the
    tower itself, as `cls_attention` reads it. Each next token is the one that adds most to the determinant of those
    kept, which is what is left of it once the kept ones are projected out (Chen et al., arXiv 1709.05135). The loop is
    unrolled, and updates the whole kernel instead of a triangular factor: constant shapes, seven operators a token.
    """

    def forward(self, x_1ND: Tensor, query_1ATK: Tensor, key_1ATK: Tensor) -> Tensor:
        score_1N = self.scores(query_1ATK, key_1ATK)
        least_11, most_11 = score_1N.amin(1, keepdim=True), score_1N.amax(1, keepdim=True)
        relevance_1N = (score_1N - least_11) / (most_11 - least_11 + LEAST * most_11) + LEAST
        given_ND = F.normalize(x_1ND[0], dim=-1) * relevance_1N.T
        kernel_NN = given_ND @ given_ND.T
        left_1N = relevance_1N * relevance_1N  # the kernel's diagonal
        for _ in range(self.keep):
            best_11, found_11 = left_1N.max(1, keepdim=True)
            row_1N = torch.index_select(kernel_NN, 0, found_11.flatten()) * best_11.clamp(min=LEAST**2).rsqrt()
            kernel_NN = kernel_NN - row_1N.T @ row_1N
            # Four less marks a token as kept and never lets it win again.
            left_1N = left_1N - row_1N * row_1N - 4 * (self.place == found_11).to(x_1ND.dtype)
        return torch.index_select(x_1ND, 1, self.raster(left_1N < -2, self.keep))
