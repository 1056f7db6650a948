"""Texts for towers that read a fixed number of tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graphs.preprocess.tokenizer import Encloser


def padded(tokenizer: Encloser, text: str, length: int, pad_id: int) -> NDArray[np.int64]:
    """Ids [1, length] of `text` between the special tokens of its tokenizer, cut to `length`, then padded behind."""
    ids = tokenizer.enclose(text, length)
    return np.array([ids + [pad_id] * (length - len(ids))], dtype=np.int64)
