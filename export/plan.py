"""`vlmx plan`: parameters, arithmetic, bytes, visual tokens, cache and a roofline latency, without reading a weight.

A roofline takes, for each call, the larger of arithmetic over peak compute and bytes over peak bandwidth (Williams,
Waterman and Patterson 2009): a lower bound on latency, which real kernels approach from above.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from graphs import registry
from graphs.errors import UserError
from graphs.files import read_json
from graphs.model import Request, bounded, choose, locate, read_preprocessor
from graphs.spec import Architecture, Method
from graphs.trace import build_fake, count_parameters
from quant.recipe import recipe

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


def flops(method: Method, mode: FakeTensorMode, length: int) -> int:
    """Floating point operations of one call with dynamic dimensions at `length`, counted on fake tensors."""
    inputs = next(method.examples(lengths=(length,)))
    counter = FlopCounterMode(display=False)
    with mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernel on CPUs is not counted
        method.module(*(mode.from_tensor(tensor) for tensor in inputs))
    return counter.get_total_flops()


def weight_bytes(module: nn.Module, width: int) -> int:
    """Bytes of a module's parameters at `width` bytes each."""
    return sum(parameter.numel() for parameter in module.parameters()) * width


def plan(request: Request, prompt_tokens: int, recipe_name: str | None) -> dict[str, Any]:
    """Everything `vlmx plan` prints, as data."""
    chosen = recipe(recipe_name or "reference-fp16")
    dtype = "fp32" if chosen.floats == "float32" else "fp16"
    width = 4 if dtype == "fp32" else 2
    name, architecture = planned_architecture(request)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    root = build_fake(architecture, mode)
    facts = architecture.facts()
    prompt = min(facts.get("visual_tokens", 0) + prompt_tokens, facts.get("context", prompt_tokens))
    costs: dict[str, Cost] = {}
    for method in architecture.methods(root):
        state = sum(torch.Size(spec.size({})).numel() for spec in method.state) * width
        read = weight_bytes(method.module, width)
        if method.state:
            costs[f"{method.name} (prefill {prompt})"] = Cost(flops(method, mode, prompt), read, state)
            costs[f"{method.name} (one token)"] = Cost(flops(method, mode, 1), read, state)
        else:  # an embedding reads the rows it needs, not its table
            read = 0 if isinstance(method.module, nn.Embedding) else read
            costs[method.name] = Cost(flops(method, mode, prompt_tokens), read, state)
    with DEVICES.open("rb") as file:
        devices = tomllib.load(file)
    total = weight_bytes(root, width)
    cache = max((cost.state_bytes for cost in costs.values()), default=0)
    return {
        "model": request.model,
        "variant": name,
        "recipe": chosen.name,
        "parameters": count_parameters(architecture),
        "deployed_parameters": total // width,
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
        lines.append(f"  visual tokens  {result['visual_tokens']} a picture")
    calls = list(result["methods"])
    lines += [f"  {call:<34}{cost['flops'] / 1e9:>12,.2f} GFLOP" for call, cost in result["methods"].items()]
    lines.append("roofline latency, ms (a bound that real kernels approach from above)")
    lines.append(f"  {'device':<22}" + "".join(f"{call:>31}" for call in calls) + "   fits")
    for key, device in result["devices"].items():
        row = "".join(f"{device['milliseconds'][call]:>31,.2f}" for call in calls)
        lines.append(f"  {key:<22}{row}   {'yes' if device['fits'] else 'NO'}")
    return "\n".join(lines)
