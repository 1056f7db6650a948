"""What `vlmx bench` measured of a bundle beside what `vlmx plan` says of it on a device, call by call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.plan import planned_architecture, work_of
from export.roofline import Device, Numbers, device, parts
from graphs.dialogue import DECODER, VISION
from runtimes.manifest import Bundle
from runtimes.session import source_request

#: what is compared
CALLS = ("vision", "prefill", "decode")


def measured_ms(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Milliseconds of each call, of a row of `vlmx bench`; None for decoding where no token followed the first."""
    decode = row["decode_tokens_per_s"]
    return {
        "vision": row["vision_ms"],
        "prefill": 1e3 * row["prompt_tokens"] / row["prefill_tokens_per_s"],
        "decode": 1e3 / decode if decode else None,
    }


def planned_ms(bundle: Bundle, prompt: int, on: Device) -> dict[str, dict[str, float | None]]:
    """The bound and what is expected of each call, in milliseconds, for a prompt of `prompt` embeddings.

    Layers have the schemes that the manifest records. Passes count by the prompt that they leave; what they save or
    cost inside of a method does not. Raises UserError where the device cannot compute in the bundle's numbers.
    """
    _, architecture = planned_architecture(source_request(bundle))
    question = max(1, prompt - (bundle.manifest["prompt"].get("visual_tokens") or 0))
    calls = work_of(architecture, question, prompt).calls
    numbers = Numbers.of_bundle(bundle.manifest)
    found = {
        "vision": next(call for call in calls.values() if call.method == VISION),
        "prefill": calls[f"{DECODER} (prefill {prompt})"],
        "decode": calls[f"{DECODER} (one token)"],
    }
    rows: dict[str, dict[str, float | None]] = {}
    for name, call in found.items():
        work = parts(call, numbers)
        expected = on.expected(work)
        rows[name] = {
            "bound_ms": 1e3 * on.bound(work),
            "expected_ms": None if expected is None else 1e3 * expected,
        }
    return rows


def compare(row: Mapping[str, Any], device_name: str) -> dict[str, dict[str, float | None]]:
    """Of each call: measured, bound, expected, and how many times the bound and the expected time the measured is."""
    planned = planned_ms(Bundle.open(Path(row["bundle"])), row["prompt_tokens"], device(device_name))
    measured = measured_ms(row)
    return {
        name: {
            "measured_ms": measured[name],
            **planned[name],
            "over_bound": ratio(measured[name], planned[name]["bound_ms"]),
            "over_expected": ratio(measured[name], planned[name]["expected_ms"]),
        }
        for name in CALLS
    }


def ratio(measured: float | None, planned: float | None) -> float | None:
    """How many times `planned` is in `measured`; None where either is missing."""
    return measured / planned if measured and planned else None


def table(rows: list[dict[str, Any]], device_name: str) -> str:
    """The comparison for people: a line a bundle and call."""
    columns = ("measured_ms", "bound_ms", "expected_ms", "over_bound", "over_expected")
    lines = [f"planned on {device_name}", f"{'bundle':<36} {'call':<9}" + "".join(f"{name:>15}" for name in columns)]
    for row in rows:
        for call, values in row["planned"].items():
            cells = (f"{value:>15,.2f}" if (value := values[name]) is not None else f"{'-':>15}" for name in columns)
            lines.append(f"{row['bundle']:<36} {call:<9}{''.join(cells)}")
    return "\n".join(lines)
