"""Small checkpoints in MobileVLM's public layout, their weights drawn by transformers' own classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from graphs.components.connectors.ldp import LDP, LDPv2

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@dataclass
class Reference:
    """The classes that a checkpoint was written from."""

    tower: CLIPVisionModel
    projector: torch.nn.Module
    decoder: LlamaForCausalLM
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def reference(
    projector: str = "ldpnet", vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None
) -> Reference:
    """Random modules and their tensors by public key."""
    vision, text = {**VISION, **(vision or {})}, {**TEXT, **(text or {})}
    torch.manual_seed(4)
    tower = CLIPVisionModel(CLIPVisionConfig(**vision)).eval()
    decoder = LlamaForCausalLM(LlamaConfig(**text)).eval()
    grid = vision["image_size"] // vision["patch_size"]
    classes = {"ldpnet": LDP, "ldpnetv2": LDPv2}
    connector = classes[projector](vision["hidden_size"], text["hidden_size"], grid).eval()
    for module in (tower, decoder, connector):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.2)
    public = {"ldpnet": "model.mm_projector.model.", "ldpnetv2": "model.mm_projector."}[projector]
    renames = {"ldpnet": {}, "ldpnetv2": {"mlp.": "mlp.mlp.", "peg.": "peg.peg.0."}}[projector]
    tensors = dict(decoder.state_dict())
    if text["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    for name, tensor in tower.state_dict().items():
        tensors[f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = tensor
    for name, tensor in connector.state_dict().items():
        first = name.split(".")[0] + "."
        tensors[public + renames.get(first, first) + name.removeprefix(first)] = tensor
    config = {
        **text,
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        "mm_projector_type": projector,
        "mm_hidden_size": vision["hidden_size"],
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "somebody/a-tower-of-their-own",
        "vision_config": vision,
    }
    return Reference(tower, connector, decoder, config, {n: t.detach().clone() for n, t in tensors.items()})


def write(directory: Path, made: Reference, shards: int = 1, index: bool = True) -> Path:
    """Save a reference as a checkpoint of `shards` files; several have an index unless told otherwise."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(made.config))
    names = sorted(made.tensors)
    parts = [names[number::shards] for number in range(shards)]
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    )
    for file, part in zip(files, parts, strict=True):
        save_file({name: made.tensors[name].contiguous() for name in part}, directory / file)
    if shards > 1 and index:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory
