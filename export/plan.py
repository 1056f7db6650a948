"""`vlmx plan`: parameters, arithmetic, bytes, visual tokens, cache and a roofline latency, without reading a weight.

A roofline takes, for each call, the larger of arithmetic over peak compute and bytes over peak bandwidth (Williams,
Waterman and Patterson 2009): a lower bound on latency, which real kernels approach from above. Encoders whose pictures
vary in size are counted at the largest picture that they take. A recipe's layers have the first of its schemes that
fits them, which a target without such kernels exchanges for a later one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from graphs import registry
from graphs.dialogue import DECODER, ENCODER
from graphs.errors import UserError
from graphs.files import read_json
from graphs.model import Request, bounded, choose, locate, read_preprocessor
from graphs.spec import Architecture, Method, TensorSpec
from graphs.trace import build_fake, count_parameters
from quant.layers import Kind, Weighed
from quant.recipe import KEEP, Recipe, recipe
from quant.resolve import fits
from quant.scheme import Scheme

DEVICES = Path(__file__).with_name("devices.toml")


@dataclass(frozen=True)
class Cost:
    """What one call of a method does: multiply-adds count as two operations, bytes are of weights and state read."""

    flops: int
    weight_bytes: int
    state_bytes: int

    def seconds(self, device: dict[str, Any], dtype: str) -> float:
        """The roofline's bound on a device."""
        compute = self.flops / (device["compute"][dtype] * 1e12)
        return max(compute, (self.weight_bytes + self.state_bytes) / (device["bandwidth"] * 1e9))


def planned_architecture(request: Request) -> tuple[str, Architecture]:
    """The variant's name and architecture; of a checkpoint only its config.json is read."""
    request = choose(request)
    model = registry.architecture(request.model)
    if request.checkpoint is None:
        published = [variant.name for variant in model.variants() if variant.parameters]
        name = request.variant or (published or ["tiny"])[0]
        architecture = registry.variant(request.model, name).architecture
    else:
        directory = locate(request.checkpoint)
        name = directory.resolve().name
        if not (directory / "config.json").is_file():
            raise UserError(f"{directory} has no config.json")
        architecture = model.from_config(read_json(directory / "config.json"), read_preprocessor(directory))
    return name, bounded(architecture, request)


#: function -> the kind of layer that it computes, and which argument is its weight
FUNCTIONS: dict[Callable[..., object], tuple[Kind, int]] = {
    F.linear: ("linear", 1),
    F.conv2d: ("conv", 1),
    F.embedding: ("embedding", 1),
}

ENCODERS = ("vision_encoder", "image_encoder")


class Watch(TorchFunctionMode):
    """Keeps the kind of layer that each weight belongs to, by the identity of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[int, Kind] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FUNCTIONS:
            kind, place = FUNCTIONS[func]
            self.kinds[id(args[place])] = kind
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Lengths:
    """What the dynamic dimensions of a call stand for: tokens of a question, and of the prompt that it makes."""

    question: int
    prompt: int
    pictures: int | None = None  # keys of one picture, where it is read by cross-attention alone

    def of(self, method: str, spec: TensorSpec, call: int) -> dict[str, int]:
        """Sizes of an input's dynamic dimensions; `call`: the tokens that a decoder is given."""
        sizes = {}
        for dim in spec.dims:
            length = self.question
            if method in ENCODERS and not spec.name.endswith("input_ids"):
                length = dim.max
            elif method == ENCODER:
                length = self.prompt
            elif method == DECODER:
                length = call if dim.name == "sequence" else self.pictures or self.prompt
            sizes[dim.name] = max(dim.min, min(dim.max, length))
        return sizes


def flops(method: Method, mode: FakeTensorMode, lengths: Lengths, call: int, watch: Watch) -> int:
    """Floating point operations of one call, counted on fake tensors."""
    counter = FlopCounterMode(display=False)
    with mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernel on CPUs is not counted
        inputs = [
            torch.zeros(spec.size(lengths.of(method.name, spec, call)), dtype=spec.dtype) for spec in method.inputs
        ]
        with counter, watch:
            method.module(*inputs)
    return counter.get_total_flops()


@dataclass(frozen=True)
class Sizes:
    """Bytes of what a recipe keeps: `width` of each number that it does not quantize."""

    recipe: Recipe
    width: int

    def scheme(self, layer: Weighed) -> Scheme | None:
        """The first scheme of the recipe that the layer fits."""
        rule = self.recipe.rule(layer)
        texts = rule.schemes if rule else ()
        wanted = next((text for text in texts if text == KEEP or fits(layer, Scheme.parse(text))), KEEP)
        return None if wanted == KEEP else Scheme.parse(wanted)

    def weights(self, method: Method, kinds: Mapping[int, Kind]) -> dict[int, int]:
        """Bytes of each parameter of a method, by the identity of the parameter."""
        found = {}
        for entry, parameter in method.module.named_parameters():
            shape, kind = tuple(parameter.shape), kinds.get(id(parameter))
            scheme = self.scheme(Weighed(method.name, entry, kind, shape)) if kind else None
            found[id(parameter)] = scheme.bytes(shape, self.width) if scheme else parameter.numel() * self.width
        return found

    def state(self, spec: TensorSpec) -> int:
        """Bytes of a state: int8 caches [1, G, C, K] have a scale a row."""
        shape = spec.size({})
        count = torch.Size(shape).numel()
        if self.recipe.kv_cache[0] == "int8" and len(shape) == 4 and spec.dtype.is_floating_point:
            return count + count // shape[-1] * self.width
        return count * self.width


def calls(method: Method, prompt: int, encoded: bool) -> dict[str, int]:
    """The calls that are counted, by how they are shown, with the tokens that a decoder is given."""
    if method.state:
        prefill = {} if encoded else {f"{method.name} (prefill {prompt})": prompt}
        return {**prefill, f"{method.name} (one token)": 1}
    varies = method.name in ENCODERS and any(
        not spec.name.endswith("input_ids") and spec.dims for spec in method.inputs
    )
    return {f"{method.name} (largest picture)" if varies else method.name: 1}


def plan(request: Request, prompt_tokens: int, recipe_name: str | None) -> dict[str, Any]:
    """Everything `vlmx plan` prints, as data."""
    chosen = recipe(recipe_name or "reference-fp16")
    dtype = "fp32" if chosen.floats == "float32" else "fp16"
    sizes = Sizes(chosen, 4 if dtype == "fp32" else 2)
    name, architecture = planned_architecture(request)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    root = build_fake(architecture, mode)
    facts = architecture.facts()
    prompt = min(facts.get("visual_tokens", 0) + prompt_tokens, facts.get("context", prompt_tokens))
    lengths = Lengths(prompt_tokens, prompt, facts.get("picture_tokens"))
    methods = architecture.methods(root)
    encoded = any(method.name == ENCODER for method in methods)
    costs: dict[str, Cost] = {}
    weights: dict[int, int] = {}
    for method in methods:
        state = sum(map(sizes.state, method.state))
        for shown, tokens in calls(method, prompt, encoded).items():
            watch = Watch()
            operations = flops(method, mode, lengths, tokens, watch)
            mine = sizes.weights(method, watch.kinds)
            # an embedding reads the rows it needs, not its table
            read = sum(size for key, size in mine.items() if watch.kinds.get(key) != "embedding")
            costs[shown] = Cost(operations, read, state)
            weights |= mine
    with DEVICES.open("rb") as file:
        devices = tomllib.load(file)
    total = sum(weights.values())
    cache = max((cost.state_bytes for cost in costs.values()), default=0)
    return {
        "model": request.model,
        "variant": name,
        "recipe": chosen.name,
        "parameters": count_parameters(architecture),
        "deployed_parameters": sum(parameter.numel() for parameter in root.parameters()),
        "weight_bytes": total,
        "kv_cache_bytes": cache,
        **facts,
        "methods": {
            call: {"flops": cost.flops, "weight_bytes": cost.weight_bytes, "state_bytes": cost.state_bytes}
            for call, cost in costs.items()
        },
        "devices": {
            key: {
                "about": device["about"],
                "fits": total + cache < 0.75 * device["memory"] * 1e9,
                "milliseconds": {call: 1e3 * cost.seconds(device, dtype) for call, cost in costs.items()},
            }
            for key, device in devices.items()
        },
    }


def describe(result: dict[str, Any]) -> str:
    """A plan for people."""
    lines = [
        f"{result['model']} {result['variant']}, {result['recipe']}",
        f"  parameters     {result['parameters'] / 1e6:,.1f} M published, "
        f"{result['deployed_parameters'] / 1e6:,.1f} M deployed",
        f"  weights        {result['weight_bytes'] / 2**20:,.1f} MiB",
    ]
    if "context" in result:
        lines.append(f"  KV cache       {result['kv_cache_bytes'] / 2**20:,.1f} MiB for {result['context']} tokens")
    if "visual_tokens" in result:
        lines.append(f"  visual tokens  {result['visual_tokens']} a picture at the most")
    calls = list(result["methods"])
    lines += [f"  {call:<34}{cost['flops'] / 1e9:>12,.2f} GFLOP" for call, cost in result["methods"].items()]
    lines.append("roofline latency, ms (a bound that real kernels approach from above)")
    lines.append(f"  {'device':<22}" + "".join(f"{call:>31}" for call in calls) + "   fits")
    for key, device in result["devices"].items():
        row = "".join(f"{device['milliseconds'][call]:>31,.2f}" for call in calls)
        lines.append(f"  {key:<22}{row}   {'yes' if device['fits'] else 'NO'}")
    return "\n".join(lines)
