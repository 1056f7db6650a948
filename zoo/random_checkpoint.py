"""Random weights of a published size: a load for exports, where the real weights are not at hand.

    python -m zoo.random_checkpoint mobilevlm --variant mobilevlm-1.7b --out DIR

The shards hold float16 tensors, each drawn from the seed and its name alone (`graphs.weights.RandomWeights`) and
written before the next is drawn. MobileVLM's and LLaVA's are in the public layout, the tower's layers that the model
never runs among them; those of other models go by the names that parameters have here, and their config.json names the
variant.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphs import registry
from graphs.components.vision.clip import ClipVisionConfig
from graphs.errors import UserError
from graphs.model import OWN_LAYOUT, parameter_shapes
from graphs.spec import Variant
from graphs.weights import RandomWeights, write_safetensors

#: of one shard, before the next begins
SHARD_BYTES = 2 << 30

#: keys of a LLaMA's configuration that the published files have
TEXT_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)
VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


def mobilevlm(model: Any) -> dict[str, Any]:
    """config.json of a MobileVLM: the decoder's keys on top, the tower described."""
    return {
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        **some(model.text, TEXT_KEYS),
        "mm_projector_type": model.projector,
        "mm_hidden_size": model.vision.hidden_size,
        "mm_vision_select_layer": model.select_layer,
        "mm_vision_tower": "random",
        "vision_config": some(model.vision, VISION_KEYS),
    }


def llava(model: Any) -> dict[str, Any]:
    """config.json of a LLaVA 1.5 as transformers writes it."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "projector_hidden_act": model.projector.activation,
        "vision_feature_layer": model.select_layer,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", **some(model.text, TEXT_KEYS)},
        "vision_config": {"model_type": "clip_vision_model", **some(model.vision, VISION_KEYS)},
    }


#: model -> what writes its configuration, and where its tower's tensors begin in the public layout
LAYOUTS: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "mobilevlm": (mobilevlm, "model.vision_tower.vision_tower.vision_model."),
    "llava_1_5": (llava, "vision_tower."),
}


def some(config: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a configuration that a published file has."""
    values = asdict(config)
    return {key: values[key] for key in keys}


def unused(shapes: Mapping[str, torch.Size], tower: str, vision: ClipVisionConfig) -> dict[str, torch.Size]:
    """Tensors of the public layout that the graph does not read: layers above the selected one, and the last norm."""
    first = f"{tower}encoder.layers.0."
    layer = {name.removeprefix(first): shape for name, shape in shapes.items() if name.startswith(first)}
    numbers = (re.fullmatch(rf"{re.escape(tower)}encoder\.layers\.(\d+)\..*", name) for name in shapes)
    built = {int(number[1]) for number in numbers if number}
    above = {
        f"{tower}encoder.layers.{number}.{name}": shape
        for number in set(range(vision.num_hidden_layers)) - built
        for name, shape in layer.items()
    }
    return {
        **above,
        **{f"{tower}post_layernorm.{name}": torch.Size([vision.hidden_size]) for name in ("weight", "bias")},
    }


class Drawn(Mapping[str, Tensor]):
    """Tensors by public name, drawn when asked for; `blank` gives one without its data."""

    def __init__(self, weights: RandomWeights) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def blank(self, name: str) -> Tensor:
        return torch.empty(self.weights.shape(name), dtype=self.weights.dtype, device="meta")


def write(out: Path, variant: Variant, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """The checkpoint's directory, of which memory holds one tensor at a time; the files of weights."""
    architecture = variant.architecture
    shapes = dict(parameter_shapes(architecture))
    document: dict[str, Any] = {OWN_LAYOUT: variant.name}
    if architecture.name in LAYOUTS:
        config, tower = LAYOUTS[architecture.name]
        document = config(architecture)
        shapes = {architecture.source(name).keys[0]: shape for name, shape in shapes.items()}
        shapes |= unused(shapes, tower, architecture.vision)  # type: ignore[attr-defined]
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps({**document, "torch_dtype": "float16"}, indent=2) + "\n")
    drawn = Drawn(RandomWeights(seed, shapes, torch.float16))
    return write_safetensors(out / "model.safetensors", drawn, shard_bytes, blank=drawn.blank)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="see `vlmx list models`")
    parser.add_argument("--variant", required=True, help="a published size, or `tiny` (see `vlmx list models`)")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        files = write(options.out, registry.variant(options.model, options.variant), options.seed)
    except UserError as error:
        parser.exit(2, f"zoo.random_checkpoint: error: {error}\n")
    print(f"{options.out}: {len(files)} files, {sum(file.stat().st_size for file in files) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
