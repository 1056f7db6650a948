"""Detected regions of a picture for models without a tower of their own, as VisualBERT takes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from graphs.preprocess.picture import Array


def region_inputs(
    input_ids: Sequence[int],
    visual_embeds: NDArray[np.float32],
    positions: int,
    token_types: Sequence[int] = (),
    visual_types: Sequence[int] = (),
    alignment: Sequence[Sequence[int]] = (),
) -> tuple[Array, ...]:
    """What VisualBERT's `fusion_encoder` takes: one text's ids, and features [N, V] of N regions of its picture.

    `positions`: how many the model has (`text_length` in a manifest). `token_types`: of each id, 0 where absent.
    `visual_types`: of each region, 1 where absent, as the authors set them. `alignment`: for each region the positions
    of the words that speak of it; none where absent. Gives ids [1, T], their types [1, T], features [1, N, V], their
    types [1, N], and the weights [1, N, positions] of the mean of each region's words; integers are int64.
    """
    regions = len(visual_embeds)
    words = np.zeros((1, regions, positions), np.float32)
    for region, spoken in enumerate(alignment):
        for position in spoken:
            words[0, region, position] += 1 / len(spoken)
    return (
        np.array([input_ids], np.int64),
        np.array([token_types or [0] * len(input_ids)], np.int64),
        visual_embeds[None].astype(np.float32),
        np.array([visual_types or [1] * regions], np.int64),
        words,
    )
