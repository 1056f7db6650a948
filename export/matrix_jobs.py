"""What `make matrix` runs: the rungs of the ladder for every architecture, each job in a process of its own."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calibration.source import Calibration
from export.answers import compare, fault
from export.matrix_page import ANSWERING
from export.measured import measured
from export.memory import peak_rss_bytes
from export.pipeline import ExportOptions, export
from export.plan import plan
from export.stages import silent
from export.targets.base import TARGETS, load_target
from graphs import registry
from graphs.components.image_text import ImageTextDecoder
from graphs.compress.passes.prune import RULES
from graphs.dialogue import EMBEDDING
from graphs.errors import UserError
from graphs.model import Request, load_model, zoo_checkpoints
from graphs.spec import Dim
from graphs.trace import count_parameters, trace
from quant.recipe import names
from runtimes.manifest import Bundle

#: what goes through every recipe, every pass, and a pass with each shipping recipe
THOROUGH = (Request("mobilevlm", "mobilevlm-nano"), Request("llava_1_5", "tiny"))

#: of the recipe and the pass that every other row goes through: half of a fixed number of visual tokens, or of any
RECIPE, PASS, THIN = "mobile-balanced", "prune{{keep={keep},method=divprune}}", "thin{factor=2}"

#: the recipe of bundles whose answers are compared: floats that leave near ties where they are
PLAIN = "reference-fp32"

#: of text, in the prompts that plans are made for
PROMPT_TOKENS = 64

TESTS = Path("tests/graphs/architectures")


@dataclass(frozen=True)
class Job:
    """One rung of one row. `kind`: "published" (L1, L2), "plan", "equality" (L3), "answers" or "export" (L4, L5)."""

    kind: str
    model: str
    variant: str = ""
    target: str = ""
    passes: str = ""
    recipe: str = ""

    @property
    def key(self) -> str:
        return ":".join((self.kind, self.model, self.variant, self.target, self.passes, self.recipe))

    def run(self) -> dict[str, Any]:
        """The row of results. A reason takes the place of numbers: refused by name, or failed."""
        return {"key": self.key, **vars(self), **KINDS[self.kind](self)}


def published(job: Job) -> dict[str, Any]:
    """L1 and L2 of a published size: parameters against the published count, all methods traced on fake tensors.

    Seconds are of the processor, which other work on the machine does not lengthen; peak memory is of the whole job.
    """
    variant = registry.variant(job.model, job.variant)
    start = time.process_time()
    program = trace(variant.architecture, {})
    program.check()
    return {
        "parameters": count_parameters(variant.architecture),
        "catalogue": variant.parameters,
        "methods": len(program.methods),
        "seconds": time.process_time() - start,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def planned(job: Job) -> dict[str, Any]:
    """What `vlmx plan` says of a published size: bytes, and the milliseconds of each call on each device it knows."""
    result = plan(Request(job.model, job.variant), PROMPT_TOKENS, None)
    devices = {name: device["milliseconds"] for name, device in result["devices"].items()}
    row = {key: result[key] for key in ("weight_bytes", "kv_cache_bytes")} | {"milliseconds": devices}
    for name, calls in devices.items():
        # a table of embeddings computes nothing, and reads but the rows that it is asked for
        if nothing := [call for call, spent in calls.items() if not 0 < spent < math.inf and EMBEDDING not in call]:
            return {**row, "failed": f"{', '.join(nothing)}: no time on {name}"}
    return row if row["weight_bytes"] > 0 else {**row, "failed": "no memory"}


def equality(job: Job) -> dict[str, Any]:
    """L3: the tests that compare this architecture with an independent implementation, as pytest counts them."""
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if f'"{job.model}"' in path.read_text()]
    if not files:
        return {"refused": "no test compares it"}
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "")
    counted = {"files": files, "seconds": time.perf_counter() - start}
    return counted if done.returncode == 0 else {**counted, "failed": last}


def lowered(job: Job) -> dict[str, Any]:
    """L4 and L5: one export, measured; or the reason why there is none."""
    with TemporaryDirectory() as scratch:
        request, out = Request(job.model, job.variant), Path(scratch) / "b"
        options = ExportOptions(request, job.target, job.recipe or None, Calibration(count=16), job.passes, out=out)
        return measured(options, partial(told, job))


def told(job: Job, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the matrix keeps of a manifest besides."""
    return {
        "recipe": job.recipe or load_target(job.target).capabilities.default_recipe,
        "schemes": manifest["quantization"]["schemes"],
        "limits": manifest["limits"],
        "seconds": sum(stage["seconds"] for stage in manifest["stages"]),
    }


def answered(job: Job) -> dict[str, Any]:
    """What a bundle answers beside the graph that it was lowered from; what is not the same is a failure."""
    start = time.perf_counter()
    with TemporaryDirectory() as scratch:
        request, out = Request(job.model, job.variant), Path(scratch) / "b"
        try:
            bundle = Bundle.open(export(ExportOptions(request, job.target, job.recipe, out=out), silent))
        except UserError as error:
            return {"refused": str(error)}
        answers = compare(bundle)
    found = {"answers": answers, "seconds": time.perf_counter() - start}
    why = fault(answers)
    return {**found, "failed": why} if why else found


#: `kind` of a job -> what it runs
KINDS = {
    "published": published,
    "plan": planned,
    "equality": equality,
    "answers": answered,
    "export": lowered,
}


def jobs(models: list[str], variants: list[str] | None) -> Iterator[Job]:
    """Every job of the given models, the cheapest rungs first; `variants` restricts what is lowered."""
    for model in models:
        if variants is None:
            sizes = [v.name for v in registry.architecture(model).variants() if v.parameters]
            yield from (Job(kind, model, name) for kind in ("published", "plan") for name in sizes)
            yield Job("equality", model)
    requests = [request for model in models for request in small(model)]
    for request in requests:
        if variants is None or request.variant in variants:
            yield from (Job("answers", request.model, str(request.variant), t, "", PLAIN) for t in ANSWERING)
            for passes, recipe in grid(request):
                yield from (Job("export", request.model, str(request.variant), t, passes, recipe) for t in TARGETS)


def small(model: str) -> list[Request]:
    """What is lowered whole: the zoo's checkpoints, and the sizes that exist for tests, with random weights."""
    zoo = [Request(model, name) for name in zoo_checkpoints() if name.split("-")[0] == model]
    tests = [v.name for v in registry.architecture(model).variants() if v.parameters is None]
    return [*zoo, *(Request(model, name) for name in tests)]


def grid(request: Request) -> Iterator[tuple[str, str]]:
    """Passes and recipes: a target's own recipe, and a quantized one, with a pass for decoders; or all there are."""
    yield "", ""
    architecture = load_model(request).architecture
    if not isinstance(architecture, ImageTextDecoder) or "visual_tokens" not in architecture.facts():
        yield "", RECIPE  # no decoder, or one that reads pictures by cross-attention: no visual tokens to compress
        return
    tokens = architecture.image_embeds().shape[1]
    if isinstance(tokens, Dim):
        yield THIN, RECIPE
        return
    half = max(1, tokens // 2)
    if request not in THOROUGH:
        yield PASS.format(keep=half), RECIPE
        return
    yield from (("", recipe) for recipe in names())
    yield from (
        (passes, "")
        for passes in (
            "pool{factor=2}",
            THIN,
            "pixel_shuffle{factor=2}",
            "ldp{version=1}",
            "ldp{version=2}",
            *(f"prune{{keep={half},method={method}}}" for method in RULES),
            f"decoder_prune{{layer=1,keep={half}}}",
        )
    )
    shipping = (recipe for recipe in names() if not recipe.startswith("reference"))
    yield from ((PASS.format(keep=half), recipe) for recipe in shipping)
