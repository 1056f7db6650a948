"""The files of zoo/mobilevlm-nano: the public layout of MobileVLM checkpoints, complete, in float16."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from graphs.architectures.mobilevlm import MobileVLM
from graphs.components.vision.clip import ClipVisionTower
from graphs.preprocess.image import CLIP_MEAN, CLIP_STD
from zoo.drawing import SIZE
from zoo.tokens import BEGIN, END, UNKNOWN

CONTEXT = 256
TOWER = "model.vision_tower.vision_tower.vision_model."


def config(tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json: the keys of the published MobileVLMs, and the tower described because it is not a published one."""
    return {
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": "float16",
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(UNKNOWN),
        "mm_projector_type": "ldpnet",
        "mm_hidden_size": 192,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": "mobilevlm-nano",
        "vision_tower_type": "clip",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 192,
            "intermediate_size": 768,
            "projection_dim": 192,
            "num_hidden_layers": 5,
            "num_attention_heads": 3,
            "num_channels": 3,
            "image_size": SIZE,
            "patch_size": 8,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
    }


def preprocessor_config() -> dict[str, Any]:
    """preprocessor_config.json: the keys of CLIPImageProcessor."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json. tokenizer.json adds no special token by itself; `add_bos_token` tells who asks."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "pad_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: greedy."""
    keys = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": UNKNOWN}
    return {**{key: tokenizer.token_to_id(token) for key, token in keys.items()}, "do_sample": False}


def architecture(tokenizer: Tokenizer) -> MobileVLM:
    """The model that those files describe."""
    return MobileVLM.from_config(config(tokenizer), preprocessor_config())


def tensors(model: MobileVLM, root: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the public layout, float16. Layers of the tower that the model never runs are initial values."""
    named = {model.source(name).keys[0]: parameter.detach() for name, parameter in root.named_parameters()}
    torch.manual_seed(0)
    whole = ClipVisionTower(replace(model.vision), select_layer=-1)
    unused = {
        f"{TOWER}encoder.{name}": value for name, value in whole.state_dict().items() if name.startswith("layers.")
    }
    width = model.vision.hidden_size
    unused[f"{TOWER}post_layernorm.weight"] = torch.ones(width)
    unused[f"{TOWER}post_layernorm.bias"] = torch.zeros(width)
    return {name: value.to(torch.float16).contiguous() for name, value in {**unused, **named}.items()}


def write(out: Path, tokenizer: Tokenizer, root: nn.Module, training: Mapping[str, Any]) -> None:
    """Writes the checkpoint's directory; `training` is kept beside the weights as training.json."""
    out.mkdir(parents=True, exist_ok=True)
    documents = {
        "config.json": config(tokenizer),
        "preprocessor_config.json": preprocessor_config(),
        "tokenizer_config.json": tokenizer_config(),
        "generation_config.json": generation_config(tokenizer),
        "training.json": dict(training),
    }
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    weights = out / "model.safetensors"
    save_file(tensors(architecture(tokenizer), root), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # the library leaves it readable to its owner alone
