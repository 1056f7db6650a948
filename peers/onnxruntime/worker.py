"""A vision encoder as an ONNX file, run by a stock session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from peers import load as what
from peers.load import Array


class Vision:
    """Threads apart, everything is the session's default."""

    def __init__(self, directory: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = what.THREADS
        self.session = onnxruntime.InferenceSession(
            directory / "vision.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.version = f"onnxruntime {onnxruntime.__version__}"
        side = self.session.get_inputs()[0].shape[-1]
        self.pixels = np.ascontiguousarray(what.picture(side).transpose(2, 0, 1)[None])

    def vision(self) -> Array:
        output: Array = self.session.run(None, {"pixel_values": self.pixels})[0]
        return output


def load(directory: Path) -> Vision:
    """The contender over an artefact's directory."""
    return Vision(directory)
