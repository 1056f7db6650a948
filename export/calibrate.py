"""`vlmx calibrate`: from a model's name and some data to a file of statistics that exports can share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from calibration.collect import collect
from calibration.samples import open_samples
from calibration.statistics import Statistics
from export.stages import Progress, Stages, to_stderr
from graphs.compress.base import apply, parse, write
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.trace import trace

STAGES = ("load", "trace", "compress", "collect", "save")


@dataclass(frozen=True)
class CalibrateOptions:
    """Everything that decides what statistics are collected, and where they go."""

    request: Request
    out: Path
    data: str = "zoo"
    count: int = 64
    seed: int = 0
    compress: str = ""
    force: bool = False


def check_out(out: Path, force: bool) -> None:
    """Raise UserError where `out` may not be written: it exists without `force`, or is no file."""
    if out.is_dir() or out.is_symlink():
        raise UserError(f"{out} is not a plain file: choose another --out, as in stats.safetensors")
    if out.exists() and not force:
        raise UserError(f"{out} exists: choose another --out, or give --force to replace it")


def calibrate(options: CalibrateOptions, progress: Progress = to_stderr) -> Statistics:
    """Collect statistics and write them to `options.out`, whole or not at all. Raises UserError."""
    check_out(options.out, options.force)
    passes = parse(options.compress)
    samples = open_samples(options.data, options.count, options.seed)
    stages = Stages(progress, STAGES)
    with stages("load", options.request.model) as say:
        model = load_model(options.request)
        say(f"weights: {model.origin}")
        if model.directory is None:
            say("WARNING: RANDOM WEIGHTS: their statistics mean nothing; give --checkpoint")
    with stages("trace", "on fake tensors"):
        program = trace(model.architecture, model.weights)
        program.check()
    with stages("compress", write(passes) or "no passes"):
        program = apply(passes, program)
    part = options.out.with_name(f".{options.out.name}.{os.getpid()}.part")
    try:
        with stages("collect", f"{options.count} samples of {options.data}, seed {options.seed}") as say:
            statistics = collect(
                model, program, samples, seed=options.seed, passes=write(passes), out=part, progress=say
            )
            for name in statistics.origin.skipped_names:
                say(f"skipped {name}")
            if not statistics.origin.images:
                say("WARNING: NO PICTURES: these statistics serve recipes that leave the vision encoder alone")
        with stages("save", str(options.out)):
            check_out(options.out, options.force)
            part.replace(options.out)
    finally:
        part.unlink(missing_ok=True)
    return statistics


def describe(statistics: Statistics, out: Path) -> str:
    """Statistics for people."""
    origin = statistics.origin
    tokens = ", ".join(f"{count} {name}" for name, count in origin.tokens.items())
    skipped = f", {origin.skipped} skipped" if origin.skipped else ""
    return (
        f"{out}: {len(statistics)} layers, {origin.count} samples of {origin.data} ({origin.images} with a picture"
        f"{skipped}), tokens: {tokens}; {out.stat().st_size / 2**20:.1f} MiB"
    )
