"""FastV (Chen et al., arXiv 2403.06764): image tokens to which the end of the prompt pays little attention are dropped.

Shape suffixes: S new tokens, C context, A heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphs.components.text.cache import MASKED


class FastV(nn.Module):
    """The mask of all layers behind the one that ranks; `pruned` [1, C] remembers which keys they may not see (1).

    It is written at the positions of each call, like the cache, so that what is written anew is judged anew.
    """

    pruned: Tensor
    place: Tensor

    def __init__(self, context: int, keep: int, scale: float) -> None:
        super().__init__()
        self.keep, self.scale = keep, scale
        self.register_buffer("pruned", torch.zeros(1, context))
        self.register_buffer("place", torch.arange(context)[None])

    def forward(
        self, mark_1S1: Tensor, query_1ASK: Tensor, key_1ACK: Tensor, mask_SC: Tensor, position_S: Tensor
    ) -> Tensor:
        """[S, C] to add to scores. Of this call's image tokens (mark 1) all but `keep` are pruned.

        They are those to which the call's last query pays least, the mean over heads; ties with the last kept stay.
        """
        # The number of the last row: positions are consecutive.
        last_1 = position_S[-1:] - position_S[:1]
        asking_1A1K, mask_1C = query_1ASK.index_select(2, last_1), mask_SC.index_select(0, last_1)
        paid_1A1C = (asking_1A1K @ key_1ACK.transpose(2, 3) * self.scale + mask_1C).softmax(-1)
        received_1C = paid_1A1C.mean(1).flatten(1)
        here_SC = (self.place == position_S.unsqueeze(1)).to(mask_SC.dtype)
        image_1C = (here_SC * (mark_1S1[0] > 0.5).to(mask_SC.dtype)).sum(0, keepdim=True)
        score_1C = image_1C * received_1C + (image_1C - 1)  # -1 for what is no image token of this call
        least_11 = torch.topk(score_1C, self.keep).values[:, -1:]
        pruned_1C = image_1C * (score_1C < least_11).to(image_1C.dtype)
        self.pruned.index_copy_(1, position_S, pruned_1C.index_select(1, position_S))
        # A pruned token sees itself still: no row is without a key, and nobody reads what becomes of it.
        return torch.minimum(mask_SC, self.pruned * (1 - here_SC) * MASKED)
