"""`vlmx plan`: parameters, arithmetic, bytes, visual tokens, cache and a roofline latency, without reading a weight.

On each device a recipe's layers have the schemes that an export to that device's target gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from export.roofline import Device, Numbers, devices, parts
from export.work import Lengths, Work, count
from graphs import registry
from graphs.errors import UserError
from graphs.files import read_json
from graphs.model import Request, bounded, choose, locate, read_preprocessor
from graphs.spec import Architecture, TensorSpec
from graphs.trace import build_fake, count_parameters
from quant.recipe import Recipe, recipe

State = tuple[TensorSpec, ...]

#: the share of a device's memory that a model may take
ROOM = 0.75


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


def prompt_length(architecture: Architecture, prompt_tokens: int) -> int:
    """The tokens of a picture and `prompt_tokens` of text, as many as the context holds."""
    facts = architecture.facts()
    return min(facts.get("visual_tokens", 0) + prompt_tokens, facts.get("context", prompt_tokens))


def work_of(architecture: Architecture, question: int, prompt: int) -> Work:
    """The calls of a dialogue whose prompt has `prompt` tokens, `question` of them text.

    Attention reads the prompt and the new token: what a cache has room for besides costs a good kernel nothing.
    """
    facts = architecture.facts()
    lengths = Lengths(question, prompt, facts.get("picture_tokens"))
    if prompt < facts.get("context", 0) - 1:
        architecture = architecture.with_context(prompt + 1)
    return count(architecture, lengths)


def weight_bytes(work: Work, numbers: Numbers) -> int:
    """What all weights take, those that methods share once."""
    found = {w.key: numbers.weight_bytes(w.numel, w.layer) for call in work.calls.values() for w in call.weights}
    return sum(found.values())


def states(architecture: Architecture) -> list[State]:
    """The state of each method, at its full context."""
    return [method.state for method in architecture.methods(build_fake(architecture)) if method.state]


def plan(request: Request, prompt_tokens: int, recipe_name: str | None) -> dict[str, Any]:
    """Everything `vlmx plan` prints, as data."""
    chosen = recipe(recipe_name or "reference-fp16")
    name, architecture = planned_architecture(request)
    work = work_of(architecture, prompt_tokens, prompt_length(architecture, prompt_tokens))
    held = states(architecture)
    numbers = Numbers.of_recipe(chosen)
    methods = {}
    for shown, call in work.calls.items():
        found = parts(call, numbers)
        state = numbers.state_bytes(call.state)
        methods[shown] = {
            "flops": call.flops,
            "weight_bytes": sum(part.bytes for part in found) - state,
            "state_bytes": state,
            "operations": {f"{part.kind} {part.numbers}": part.flops for part in found if part.flops},
        }
    return {
        "model": request.model,
        "variant": name,
        "recipe": chosen.name,
        "parameters": count_parameters(architecture),
        "deployed_parameters": work.deployed,
        "weight_bytes": weight_bytes(work, numbers),
        "kv_cache_bytes": max(map(numbers.state_bytes, held), default=0),
        **architecture.facts(),
        "methods": methods,
        "devices": {key: estimate(work, held, device, chosen) for key, device in devices().items()},
    }


def estimate(work: Work, held: Sequence[State], device: Device, chosen: Recipe) -> dict[str, Any]:
    """A device's row: `milliseconds` at the least, those expected where that is known; or why there are none."""
    row: dict[str, Any] = {"about": device.about, "target": device.target}
    try:
        numbers = Numbers.on_target(chosen, device.target)
        found = {shown: parts(call, numbers) for shown, call in work.calls.items()}
        bounds = {shown: 1e3 * device.bound(call) for shown, call in found.items()}
    except UserError as error:
        return row | {"refused": str(error), "fits": False, "milliseconds": {}, "expected_milliseconds": {}}
    expected = {shown: 1e3 * each for shown, call in found.items() if (each := device.expected(call)) is not None}
    total = weight_bytes(work, numbers) + max(map(numbers.state_bytes, held), default=0)
    return row | {
        "floats": numbers.floats,
        "fits": total < ROOM * device.memory * 1e9,
        "milliseconds": bounds,
        "expected_milliseconds": expected if len(expected) == len(bounds) else {},
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
    for call, cost in result["methods"].items():
        split = ", ".join(f"{name} {flops / 1e9:,.2f}" for name, flops in cost["operations"].items())
        lines.append(f"  {call:<34}{cost['flops'] / 1e9:>12,.2f} GFLOP{f': {split}' if split else ''}")
    calls = list(result["methods"])
    lines.append(
        "milliseconds: the bound of the roofline and, where efficiency was measured, what good kernels should take"
    )
    lines.append(f"  {'device':<22}{'':<10}" + "".join(f"{call:>31}" for call in calls) + "   floats     fits")
    for key, device in result["devices"].items():
        if "refused" in device:
            lines.append(f"  {key:<22}{device['refused']}")
            continue
        for kind, milliseconds in (("bound", "milliseconds"), ("expected", "expected_milliseconds")):
            if found := device[milliseconds]:
                row = "".join(f"{found[call]:>31,.2f}" for call in calls)
                about = f"   {device['floats']:<11}{'yes' if device['fits'] else 'NO'}" if kind == "bound" else ""
                lines.append(f"  {key if kind == 'bound' else '':<22}{kind:<10}{row}{about}")
    return "\n".join(lines)
