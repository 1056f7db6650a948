"""From what a user names (a model, a variant, a checkpoint) to an architecture with weights behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphs import registry
from graphs.config import ConfigReader
from graphs.errors import UserError, nearest
from graphs.files import read_optional_json
from graphs.sources import Source
from graphs.spec import Architecture
from graphs.trace import build_fake
from graphs.weights import Checkpoint, RandomWeights, Weights, resolve_checkpoint

ZOO = Path(__file__).resolve().parent.parent / "zoo"

#: what a checkpoint directory may hold besides weights that a bundle carries on
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)

#: what config.json of a checkpoint of ours says in place of a configuration: the variant, whose parameters go by the
#: names that they have here
OWN_LAYOUT = "vlmx_variant"

#: directories of a checkpoint that may hold some of those again: tokenizers of a second vocabulary
SECOND = ("qformer_tokenizer",)


@dataclass(frozen=True)
class Request:
    """What to load: a model, and at most one of a published variant with random weights or a checkpoint.

    Serves as the manifest's record of where a bundle came from.
    """

    model: str
    variant: str | None = None
    checkpoint: str | None = None  # a directory, a hub id, or zoo:NAME
    seed: int = 0
    allow_pickle: bool = False
    allow_nan: bool = False
    max_context: int | None = None


@dataclass(frozen=True)
class Model:
    """An architecture and its weights; `directory` is the checkpoint's, None for random weights."""

    request: Request  # with the checkpoint that was chosen filled in
    variant: str
    architecture: Architecture
    weights: Mapping[str, Tensor]
    directory: Path | None

    @property
    def origin(self) -> str:
        """In words, where the weights came from."""
        return self.request.checkpoint or f"random (seed {self.request.seed})"


def zoo_checkpoints() -> dict[str, Path]:
    """The trained checkpoints that ship with vlmx, by name; `MODEL-anything` is of the architecture MODEL."""
    return {path.parent.name: path.parent for path in sorted(ZOO.glob("*/config.json"))}


def choose(request: Request) -> Request:
    """`request` with its defaults: the zoo's checkpoint of the model where it has one, unless a variant is named.

    A variant that is a zoo checkpoint's name chooses it. Raises UserError for an unknown model or variant.
    """
    registry.architecture(request.model)
    zoo = {name: path for name, path in zoo_checkpoints().items() if name.split("-")[0] == request.model}
    if request.checkpoint is not None:
        return request
    if request.variant is None:
        return replace(request, checkpoint=f"zoo:{next(iter(zoo))}") if zoo else request
    if request.variant in zoo:
        return replace(request, checkpoint=f"zoo:{request.variant}")
    variants = [variant.name for variant in registry.architecture(request.model).variants()]
    if request.variant not in variants:
        hint = nearest(request.variant, [*variants, *zoo])
        raise UserError(f"unknown variant '{request.variant}' of {request.model}: {hint}")
    return request


def locate(checkpoint: str, allow_pickle: bool = False) -> Path:
    """The directory of a checkpoint: `zoo:NAME`, a path, or a hub id (downloaded)."""
    if not checkpoint.startswith("zoo:"):
        return resolve_checkpoint(checkpoint, allow_pickle=allow_pickle)
    name, zoo = checkpoint.removeprefix("zoo:"), zoo_checkpoints()
    if name not in zoo:
        raise UserError(f"unknown zoo checkpoint '{name}': {nearest(name, zoo)}")
    return zoo[name]


def load_model(request: Request) -> Model:
    """The model that `request` names, its checkpoint's tensors checked by name and shape, none of them read yet.

    Raises UserError.
    """
    request = choose(request)
    if request.checkpoint is None:
        variant = registry.variant(request.model, request.variant or "tiny")
        architecture = bounded(variant.architecture, request)
        weights: Mapping[str, Tensor] = RandomWeights(request.seed, parameter_shapes(architecture))
        return Model(request, variant.name, architecture, weights, None)
    directory = locate(request.checkpoint, request.allow_pickle)
    checkpoint = Checkpoint.open(directory, allow_pickle=request.allow_pickle, allow_nan=request.allow_nan)
    if (own := checkpoint.config.get(OWN_LAYOUT)) is not None:
        architecture = registry.variant(request.model, str(own)).architecture
    else:
        preprocessor = read_preprocessor(directory)
        architecture = registry.architecture(request.model).from_config(checkpoint.config, preprocessor)
        checkpoint.rename(architecture.aliases)
        architecture = architecture.given(checkpoint)
    architecture = bounded(architecture, request)
    source = architecture.source if own is None else Source
    shapes = parameter_shapes(architecture)
    found = Weights(checkpoint, {name: source(name) for name in shapes})
    found.check(shapes, architecture.unused if own is None else ())
    return Model(request, directory.resolve().name, architecture, found, directory)


def read_preprocessor(directory: Path) -> dict[str, Any]:
    """How a checkpoint prepares pictures; empty where it does not say.

    In preprocessor_config.json, or in what transformers writes since its version 5, the `image_processor` of
    processor_config.json. Raises UserError.
    """
    whole = ConfigReader(read_optional_json(directory, "processor_config.json"), "processor_config.json")
    nested = whole.section("image_processor").values
    return read_optional_json(directory, "preprocessor_config.json") or dict(nested)


def parameter_shapes(architecture: Architecture) -> dict[str, torch.Size]:
    """Every parameter of the architecture's root module: name and shape."""
    return {name: tensor.shape for name, tensor in build_fake(architecture).named_parameters()}


def bounded(architecture: Architecture, request: Request) -> Architecture:
    """`architecture` with the context that `request` bounds it to."""
    return architecture if request.max_context is None else architecture.with_context(request.max_context)
