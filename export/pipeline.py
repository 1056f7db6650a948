"""The way from a model's name to a verified bundle: load, trace, compress, quantize, lower, verify, publish."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from calibration.prompts import prompted
from calibration.source import SUFFIX, Calibration
from calibration.statistics import Statistics
from export.bundle import check_destination, left_behind, staged, write_manifest
from export.ceiling import check_memory, largest, needed
from export.content import Content
from export.gate import Limit, execute, quantized, words
from export.memory import keep_temporaries, rare_collections, reclaim
from export.pieces import Pieces, begun, bundles_beside, recorded_origin, whole
from export.sample import Sample, check_verify, lower_part
from export.stability import trial
from export.stages import Progress, Stages, to_stderr
from export.targets.base import Lowered, LowerOptions, Target, load_target
from export.verify import (
    Call,
    Vectors,
    compare_compressed,
    declared,
    inputs_of,
    last_ones,
    program_signatures,
    record_eager,
    save_vectors,
    seeded_inputs,
)
from graphs.compress.base import Pass, apply, digests, parse, write
from graphs.errors import UserError
from graphs.files import contained
from graphs.model import COMPANIONS, SECOND, Model, Request, load_model
from graphs.overhead import spared
from graphs.preprocess.tokenizer import load_tokenizer
from graphs.program import Program
from graphs.trace import trace
from quant.apply import Quantization
from quant.recipe import Recipe, recipe
from quant.resolve import Resolved, resolve
from runtimes.base import Artifact, Unavailable, load_runtime
from runtimes.manifest import SCHEMA, VECTORS, signature_to_json

#: in a staging directory: what calibration saw
STATISTICS = ".statistics.safetensors"

STAGES = ("load", "trace", "compress", "calibrate", "quantize", "lower", "verify", "publish")


@dataclass(frozen=True)
class ExportOptions:
    """Everything that decides what an export makes."""

    request: Request
    target: str
    recipe: str | None = None  # a name or a file; None: the target's default
    calibration: Calibration = field(default_factory=Calibration)
    compress: str = ""
    out: Path | None = None  # None: bundles/VARIANT-TARGET
    force: bool = False
    verify: str = "auto"  # one of `export.sample.VERIFY`
    max_memory: int | None = None  # bytes that the process may take
    extra: Mapping[str, str] = field(default_factory=dict)  # the target's own options
    anew: bool = False  # make everything, whatever was made of the same inputs before


def visual_tokens(program: Program) -> int | None:
    """How many image embeddings [1, N, D] one picture becomes at the most; None for a program that makes none."""
    encoder = program.methods.get("vision_encoder")
    shape = encoder.signature.outputs[0].shape if encoder else ()
    if len(shape) != 3:
        return None
    return shape[1] if isinstance(shape[1], int) else shape[1].max


def compress_record(compressed: Program, source: Program, changed: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """The `compress` entries of the manifest: None for a method that passes did not change."""
    before, after = ({name: program.methods[name].signature for name in changed} for program in (source, compressed))
    given = seeded_inputs(after)
    plain = {name: [declared(call, before[name].inputs) for call in calls] for name, calls in given.items()}
    actual, expected = record_eager(compressed, given), record_eager(source, plain)
    actual = {
        name: [Call(call.inputs, declared(call.outputs, before[name].outputs)) for call in calls]
        for name, calls in actual.items()
    }
    expected = {
        name: [Call(call.inputs, last_ones(call.outputs, before[name].outputs, after[name].outputs)) for call in calls]
        for name, calls in expected.items()
    }
    return {**dict.fromkeys(source), **compare_compressed(actual, expected)}


def prompt_record(model: Model, tokens: int | None) -> dict[str, Any]:
    """What a client must know to prepare inputs and to stop: template, special tokens, context, picture handling.

    `tokens`: the image embeddings that one picture becomes in the program as deployed.
    """
    architecture = model.architecture
    tokenizer = load_tokenizer(model.directory) if model.directory else None
    processor = architecture.image_processor
    begins = architecture.template is None or architecture.template.begin
    return {
        "template": asdict(architecture.template) if architecture.template else None,
        "image": processor.to_json() if processor else None,
        "bos_id": tokenizer.bos_id if tokenizer and tokenizer.adds_bos and begins else None,
        "eos_ids": list(tokenizer.eos_ids) if tokenizer else [],
        "takes": "text and pictures" if tokenizer else "tensors only: the source has no tokenizer",
        **architecture.facts(),
        **({} if tokens is None else {"visual_tokens": tokens}),
    }


def source_record(model: Model) -> dict[str, Any]:
    """Where the weights came from: enough for the eager runtime to load them again."""
    return {**asdict(model.request), "weights": model.origin}


def artifact_of(program: Program, lowered: Lowered, directory: Path) -> Artifact:
    """What the runtime loads, as the manifest will describe it."""
    return Artifact(directory, program_signatures(program), lowered.files, lowered.details)


def verify_lowered(
    target: str, artifact: Artifact, lowered: Lowered, expected: Vectors, limits: Mapping[str, Limit]
) -> dict[str, dict[str, Any]]:
    """The `lower` entries of the manifest. Raises GateError where a method is off by more than its limit."""
    try:
        runtime = load_runtime(target, artifact)
    except Unavailable as why:
        return {
            name: {"executed": False, "why": str(why), "checked": lowered.checked.get(name, "")} for name in expected
        }
    return execute(runtime, expected, limits, target)


def copy_companions(model: Model, directory: Path) -> None:
    """Bring along the tokenizer and configuration files that the checkpoint has."""
    if model.directory is None:
        return
    for place in (".", *SECOND):
        for name in COMPANIONS:
            if (model.directory / place / name).exists():
                (directory / place).mkdir(exist_ok=True)
                shutil.copyfile(contained(model.directory / place, name), directory / place / name)


def check_space(program: Program, directory: Path) -> None:
    """Raise UserError where the disk has less room than the weights alone will take."""
    tensors = (tensor for name in program for tensor in program.methods[name].exported.state_dict.values())
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory} has {free >> 20} MiB free, the bundle needs {needed >> 20} MiB: choose another --out"
        )


@dataclass(frozen=True)
class Job:
    """What an export is to lower: the source program, as passes changed it, and what the recipe makes of its layers."""

    options: ExportOptions
    target: Target
    model: Model
    passes: Sequence[Pass]
    chosen: Recipe
    source: Program
    compressed: Program
    resolved: Resolved

    @property
    def tokens(self) -> dict[str, int | None]:
        """Image embeddings of a picture, before and after the passes."""
        return {"before": visual_tokens(self.source), "after": visual_tokens(self.compressed)}


def export(options: ExportOptions, progress: Progress = to_stderr) -> Path:
    """Make a bundle; its directory. Raises UserError for what the user can mend and GateError for a failed check.

    One that is there already, made of the same inputs, stays as it is.
    """
    target: Target = load_target(options.target)
    table = target.capabilities
    chosen = recipe(options.recipe or table.default_recipe)
    passes = parse(options.compress)
    check_verify(options.verify)
    stages = Stages(progress, STAGES)
    keep_temporaries()
    if options.out is not None:
        check_destination(options.out, force=True)
    with stages("load", options.request.model) as say:
        model = load_model(options.request)
        say(f"weights: {model.origin}")
        if model.directory is None:
            say("WARNING: RANDOM WEIGHTS: this bundle computes nothing meaningful; give --checkpoint")
        out = options.out or Path("bundles") / f"{model.variant}-{options.target}"
        content = Content(model, passes, options.target, options.extra)
    with content, rare_collections(), spared():
        origin = {"asked": content.asked(chosen, options.verify)}
        recorded = recorded_origin(out)
        again = not (options.force or options.anew) and recorded.get("asked") == origin["asked"]
        check_destination(out, options.force or again)
        with stages("trace", "on fake tensors") as say:
            source = trace(model.architecture, model.weights)
            source.check()
            say(f"methods: {', '.join(source)}")
        with stages("compress", write(passes) or "no passes") as say:
            compressed = apply(passes, source)
            resolved = resolve(chosen, compressed, options.target, table, prompted(model, compressed))
            job = Job(options, target, model, passes, chosen, source, compressed, resolved)
            if passes:
                say(f"visual tokens: {job.tokens['before']} -> {job.tokens['after']}")
            if options.max_memory is not None:
                checked = Sample.choose(source, compressed, options.verify).of(compressed)
                size = options.calibration.collected, job.tokens["after"] or 0
                stages.estimated = needed(table, compressed, checked, resolved, *size)
                check_memory(stages.estimated, options.max_memory)
                say(f"memory: {largest(stages.estimated)}")
        if resolved.needs_statistics:
            origin["statistics"] = content.statistics(options.calibration, resolved.needs_hessians)
        if again and recorded == {**origin, "weights": content.of_weights()} and whole(out):
            progress(f"{out}: made of the same inputs, and whole: nothing to do (--anew makes it all again)")
            return out
        earlier = ([], []) if options.anew else (left_behind(out), bundles_beside(out))
        with (
            staged(out, options.force, begun) as directory,
            Pieces(directory, *earlier, lambda line: progress(f"      {line}")) as pieces,
        ):
            make(job, directory, out, content, origin, pieces, stages)
    return out


def calibrated(job: Job, directory: Path, key: str | None, pieces: Pieces, say: Progress) -> Statistics | None:
    """What the recipe needs to know of the layers' inputs: read from a file, collected, or collected before."""
    if key is None:
        return None
    given, hessians = job.options.calibration, job.resolved.needs_hessians
    out = directory / STATISTICS
    compute = partial(given.statistics, job.model, job.compressed, write(job.passes), hessians, say, out)
    if given.data.endswith(SUFFIX):
        return compute()
    collected: list[Statistics] = []

    def collect() -> dict[str, Any]:
        collected.append(compute())
        return {}

    pieces("statistics", lambda: key, collect)
    return collected[0] if collected else Statistics.load(out, job.compressed)


def make(
    job: Job, directory: Path, out: Path, content: Content, origin: dict[str, str], pieces: Pieces, stages: Stages
) -> None:
    """Fill a staging directory: calibrate, quantize, lower, verify, and describe it all."""
    options, target, model, resolved = job.options, job.target, job.model, job.resolved
    source, compressed, table = job.source, job.compressed, job.target.capabilities
    prompt = prompt_record(model, job.tokens["after"])
    with stages("calibrate", options.calibration.about() if resolved.needs_statistics else "not needed") as say:
        statistics = calibrated(job, directory, origin.get("statistics"), pieces, say)
    with stages("quantize", job.chosen.name) as say:
        quantization = Quantization(resolved, statistics, say)
        rounded = quantization.rounded(compressed)
        program = quantization.cast(rounded)
        program.check()
        for method, schemes in resolved.counts().items():
            say(f"{method}: {', '.join(f'{count} x {scheme}' for scheme, count in schemes.items())}")
    check_space(program, directory)
    with stages("lower", options.target) as say:
        legal = target.legalize(program)
        legal.check()
        sample = Sample.choose(source, program, options.verify)
        before, unrounded, part = compressed, rounded, program
        if sample.without:
            before = sample.of(compressed)
            again = quantization.on(before)
            unrounded = again.rounded(before)
            part = again.cast(unrounded)
        checks = trial(resolved, table.limit(resolved.floats, resolved.quantized), unrounded, part)
        reclaim()
        expected, metadata = checks.expected, {**prompt, "variant": model.variant}
        loads = not sample.without

        def piece(methods: Sequence[str], write_files: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            limits = [checks.limits[method].to_json() for method in methods]
            key = partial(
                content.lowered,
                *(compressed, methods, resolved, origin.get("statistics")),
                *(limits, checks.seed, metadata, loads),
            )
            return pieces(", ".join(methods), key, write_files)

        given = LowerOptions(
            resolved.floats, checks.limits, checks.seed, metadata, options.extra, loads, progress=say, piece=piece
        )
        lowered = target.lower(legal, directory, given)
        quantization.forget()
    with stages("verify", f"{sample}, against the source graph") as say:
        unquantized = None if program is compressed else record_eager(before, inputs_of(expected))
        quantize = quantized(expected, unquantized, checks.limits) if unquantized else None
        changed = [name for name in source if compressed.methods[name] is not source.methods[name]]
        compress = compress_record(before, before if source is compressed else sample.of(source), changed)
        artifact = artifact_of(program, lowered, directory)
        with TemporaryDirectory(prefix=".sample-", dir=directory) as scratch:
            run = lower_part(target, part, given, Path(scratch)) if sample.without else (artifact, lowered)
            lower = verify_lowered(options.target, *run, expected, checks.limits)
        for name, entry in lower.items():
            say(f"{name}: {describe(entry)}")
    with stages("publish", str(out)):
        pieces.finish()
        save_vectors(directory / VECTORS, expected)
        copy_companions(model, directory)
        write_manifest(
            directory,
            {
                "schema": SCHEMA,
                "vlmx": version("vlmx"),
                "architecture": model.request.model,
                "variant": model.variant,
                "source": source_record(model),
                "made_of": {**origin, "weights": content.of_weights()},
                "target": options.target,
                "passes": write(job.passes),
                "passes_read": digests(job.passes),
                "tokens": job.tokens,
                "recipe": job.chosen.name,
                "quantization": resolved.to_json(),
                "weight_bytes": resolved.weight_bytes(compressed),
                "calibration": None if statistics is None else statistics.origin.to_json(),
                "limits": {name: limit.to_json() for name, limit in checks.limits.items()},
                "vectors_seed": checks.seed,
                "left_out": sample.to_json(),
                "prompt": prompt,
                "methods": {
                    name: {"file": lowered.files[name], **signature_to_json(signature)}
                    for name, signature in artifact.signatures.items()
                },
                "details": dict(lowered.details),
                "verification": {
                    name: {
                        "compress": compress[name],
                        "quantize": quantize[name] if quantize else None,
                        "lower": lower[name],
                    }
                    for name in program
                },
                "versions": {
                    "python": platform.python_version(),
                    "torch": str(torch.__version__),
                    **lowered.versions,
                },
                "pieces": pieces.to_json(),
                "stages": stages.records,
            },
            pieces.known(),
        )


def describe(entry: Mapping[str, Any]) -> str:
    """A `lower` entry in words."""
    if entry["executed"]:
        return f"relative L2 {words(entry)} (limit {entry['limit']:g}) by {entry['by']}"
    return f"NOT EXECUTED, {entry['why']}; {entry['checked'] or 'nothing checked'}"
