"""Keeps libraries from talking over our own progress."""

from __future__ import annotations

import logging
import os
import warnings

#: libraries whose warnings about missing accelerators and untested versions say nothing that a user can act on
TALKATIVE = ("coremltools", "torchao", "torch.utils._pytree", "torch.onnx", "onnxscript", "executorch", "root")


def quiet_libraries() -> None:
    """Errors only, from here on, for this process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    for name in TALKATIVE:
        logging.getLogger(None if name == "root" else name).setLevel(logging.ERROR)
