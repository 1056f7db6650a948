"""The vision encoder in float32 as torch's own exporter writes it: what a user of plain ONNX Runtime would have.

python -m peers.ours.vision_onnx OUT CHECKPOINT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from peers import load as what
from peers.ours.eager import module, opened


def main() -> None:
    """OUT/vision.onnx, its weights beside it."""
    torch.set_num_threads(what.THREADS)
    out, checkpoint = map(Path, sys.argv[1:])
    model = opened(checkpoint)
    side = model.architecture.facts()["image_size"]
    pixels = torch.from_numpy(what.picture(side)).permute(2, 0, 1).unsqueeze(0)
    torch.onnx.export(
        module(model, "vision_encoder"),
        (pixels,),
        str(out / "vision.onnx"),
        input_names=["pixel_values"],
        output_names=["image_embeds"],
        external_data=True,
        dynamo=True,
        verbose=False,
    )


if __name__ == "__main__":
    main()
