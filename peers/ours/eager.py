"""The source model in float32, from the checkpoint: the reference, and what others lower."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from graphs.model import Model, Request, load_model
from graphs.trace import tables
from peers.load import CONTEXT


def opened(checkpoint: Path) -> Model:
    """The model that all contenders are made from."""
    return load_model(Request("mobilevlm", checkpoint=str(checkpoint), max_context=CONTEXT))


def module(model: Model, method: str) -> nn.Module:
    """What computes a method, with its weights; only these are read."""
    with torch.device("meta"):
        part = model.architecture.build().get_submodule(method)
    part.to_empty(device="cpu")
    for name, parameter in part.named_parameters():
        parameter.data.copy_(model.weights[f"{method}.{name}"])
    for buffer in part.buffers():
        buffer.zero_()
    for name, table in tables(part):
        part.get_buffer(name).copy_(table)
    return part.eval().requires_grad_(False)
