"""ONNX Runtime's own static quantizer: 8-bit weights per channel and activations, ranges from eight pictures.

python -m peers.onnxruntime.quantize OUT VISION_FP32
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from peers import load as what

#: pictures that ranges are taken from; none is the one that is measured
SEEDS = range(10, 18)


class Pictures(CalibrationDataReader):
    """Feeds them one at a time."""

    def __init__(self, side: int) -> None:
        self.left: Iterator[Any] = (what.picture(side, seed).transpose(2, 0, 1)[None] for seed in SEEDS)

    def get_next(self) -> dict[str, Any] | None:
        pixels = next(self.left, None)
        return None if pixels is None else {"pixel_values": np.ascontiguousarray(pixels)}


def main() -> None:
    """OUT/vision.onnx from VISION_FP32/vision.onnx."""
    out, given = map(Path, sys.argv[1:])
    side = onnx.load(given / "vision.onnx", load_external_data=False).graph.input[0].type.tensor_type.shape.dim[-1]
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        prepared = Path(scratch) / "vision.onnx"
        quant_pre_process(given / "vision.onnx", prepared, skip_symbolic_shape=True, save_as_external_data=True)
        quantize_static(
            prepared,
            out / "vision.onnx",
            Pictures(side.dim_value),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=True,
        )


if __name__ == "__main__":
    main()
