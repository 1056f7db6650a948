"""`vlmx bench`: latency of pictures, prefill and decoding, memory and size, medians over repeated runs."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from export.memory import peak_rss_bytes, reset_peak
from export.stages import Progress
from graphs.dialogue import Segment
from graphs.errors import UserError
from graphs.preprocess.picture import View, from_json
from runtimes.generate import Generation, generate
from runtimes.manifest import Bundle
from runtimes.session import open_runtime

COLUMNS = ("vision_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms", "peak_rss_bytes", "file_bytes")


def seeded_prompt(bundle: Bundle, prompt_tokens: int) -> list[Segment]:
    """A picture of noise, as the bundle's processor makes it, and `prompt_tokens` random ids.

    Raises UserError where the bundle is no image-text decoder.
    """
    inputs = {name: signature.inputs for name, signature in bundle.artifact.signatures.items()}
    if not {"vision_encoder", "token_embedding", "text_decoder"} <= set(inputs):
        raise UserError(f"{bundle.directory}: bench measures image-text decoders; this is {', '.join(inputs)}")
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (480, 640, 3), np.uint8))
    picture = from_json(bundle.manifest["prompt"]["image"]).picture(noise)
    ids = generator.integers(0, inputs["token_embedding"][0].high, prompt_tokens)
    return [View(picture), ids.tolist()]


def bench(
    directory: Path, runtime_name: str | None, repeat: int, prompt_tokens: int, new_tokens: int, progress: Progress
) -> dict[str, Any]:
    """One row: medians of `repeat` runs after one that warms up; peak memory is the whole process's."""
    bundle = Bundle.open(directory)
    segments = seeded_prompt(bundle, prompt_tokens)
    reset_peak()
    runtime = open_runtime(bundle, runtime_name)
    runs: list[Generation] = []
    for number in range(repeat + 1):
        progress(f"{directory}: run {number} of {repeat}" if number else f"{directory}: warming up")
        context = bundle.manifest["prompt"]["context"]
        *_, last = generate(runtime, segments, context=context, max_new_tokens=new_tokens)
        runs.append(last)
    runs = runs[1:]
    decode = [seconds for run in runs for seconds in run.decode_seconds]
    prefill = statistics.median(run.prefill_seconds for run in runs)
    return {
        "bundle": str(directory),
        "runtime": runtime.version,
        "visual_tokens": bundle.manifest["prompt"].get("visual_tokens"),
        "prompt_tokens": runs[0].prompt_tokens,
        "runs": repeat,
        "load": os.getloadavg()[0],
        "vision_ms": 1e3 * statistics.median(run.vision_seconds for run in runs),
        "prefill_tokens_per_s": runs[0].prompt_tokens / prefill,
        "decode_tokens_per_s": 1 / statistics.median(decode) if decode else None,
        "ttft_ms": 1e3 * statistics.median(run.first_token_seconds for run in runs),
        "peak_rss_bytes": peak_rss_bytes(),
        "file_bytes": sum(record["bytes"] for record in bundle.manifest["files"].values()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people: a line a bundle, what executed it below."""
    head = f"{'bundle':<36}" + "".join(f"{column:>21}" for column in COLUMNS)
    lines = [head]
    for row in rows:
        cells = (f"{row[column]:>21,.1f}" if row[column] is not None else f"{'-':>21}" for column in COLUMNS)
        lines += [f"{row['bundle']:<36}{''.join(cells)}", f"  by {row['runtime']}"]
    return "\n".join(lines)
