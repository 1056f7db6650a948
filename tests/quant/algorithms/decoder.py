"""Real layers of zoo/mobilevlm-nano's decoder and the real inputs they get, from the plain eager modules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from calibration.samples import zoo_samples
from graphs.model import Request, load_model
from graphs.preprocess.prompt import ImageSegment, segments, tokenize
from graphs.preprocess.tokenizer import load_tokenizer

NANO = Request("mobilevlm", checkpoint="zoo:mobilevlm-nano")


@dataclass(frozen=True)
class Recorded:
    """A layer's weight [O, K] and its inputs [R, K]."""

    weight: Tensor
    rows: Tensor


@cache
def decoder(count: int = 24, seed: int = 7) -> dict[str, Recorded]:
    """Every linear layer of the text decoder, over prompts and answers about `count` pictures."""
    model = load_model(NANO)
    architecture = model.architecture
    assert model.directory is not None
    tokenizer = load_tokenizer(model.directory)
    assert tokenizer is not None
    assert architecture.image_processor is not None
    assert architecture.template is not None
    root = architecture.build().eval().requires_grad_(False)
    root.load_state_dict({name: model.weights[name] for name in model.weights}, strict=False)
    linears = {name: layer for name, layer in root.text_decoder.named_modules() if isinstance(layer, nn.Linear)}
    rows: dict[str, list[Tensor]] = {name: [] for name in linears}
    for name, layer in linears.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: rows[name].append(args[0][0].clone()))
    for sample in zoo_samples(count, seed, "train"):
        parts = []
        for piece in tokenize(segments(architecture.template, sample.question, 1), tokenizer):
            if isinstance(piece, ImageSegment):
                pixels = torch.from_numpy(architecture.image_processor(sample.image))
                parts.append(root.vision_encoder(pixels))
            else:
                parts.append(root.token_embedding(torch.from_numpy(piece)[None]))
        embeds = torch.cat(parts, 1)
        root.text_decoder(embeds, torch.arange(embeds.shape[1]))
    return {name: Recorded(layer.weight, torch.cat(rows[name])) for name, layer in linears.items()}
