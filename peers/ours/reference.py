"""What every measure's output is in float32: OUT/MEASURE.npy, for the accuracy that stands beside each time.

python -m peers.ours.reference OUT CHECKPOINT
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphs.components.vision.clip import ClipEmbeddings
from peers import load as what
from peers.ours.eager import module, opened


def logits(decoder: torch.nn.Module, embeds: Tensor, start: int = 0) -> Tensor:
    """The logits [1, S, V] of embeddings [1, S, D] that stand from `start` on."""
    out: Tensor = decoder(embeds, torch.arange(start, start + embeds.shape[1]))
    return out


def class_last(embeddings: ClipEmbeddings, pixels: Tensor) -> Tensor:
    """Patches, then the class token, then positions in order: what llama-cpp-python 0.3.36 computes in place of CLIP.

    Its graph concatenates the token behind the patches, and still leaves out the first row as the token's.
    """
    assert embeddings.class_embedding is not None
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    whole: Tensor = torch.cat([patches, embeddings.class_embedding.reshape(1, 1, -1)], 1)
    return whole + embeddings.position_embedding.weight


@torch.no_grad()
def main() -> None:
    """One method's weights are in memory at a time, the embedding's apart."""
    torch.set_num_threads(what.THREADS)
    out, checkpoint = map(Path, sys.argv[1:])
    model = opened(checkpoint)
    embedding = module(model, "token_embedding")
    pixels = torch.from_numpy(what.picture(model.architecture.facts()["image_size"]))
    encoder: Any = module(model, "vision_encoder")
    image = encoder(pixels.permute(2, 0, 1).unsqueeze(0))
    encoder.tower.embeddings.forward = partial(class_last, encoder.tower.embeddings)
    other = encoder(pixels.permute(2, 0, 1).unsqueeze(0))
    del encoder
    decoder = module(model, "text_decoder")
    prompt, after, question = (
        embedding(torch.tensor([ids])) for ids in (what.prompt_ids(), what.next_ids(), what.question_ids())
    )
    found = {"vision": image, "vision_class_last": other}
    found["prefill"] = logits(decoder, prompt)[0, -1]
    found["decode"] = logits(decoder, after, what.PREFILL)[0, -1]
    found["ttft"] = logits(decoder, torch.cat([image, question], 1))[0, -1]
    for measure, output in found.items():
        np.save(out / f"{measure}.npy", output.numpy())


if __name__ == "__main__":
    main()
