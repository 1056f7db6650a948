"""What an export is made of, told apart by content: the keys under which finished work is found again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from types import TracebackType
from typing import Any

from calibration.samples import open_samples
from calibration.source import SUFFIX, Calibration
from graphs.checkpoint import CONFIG
from graphs.compress.base import Pass, digests, write
from graphs.files import sha256
from graphs.model import COMPANIONS, SECOND, Model
from graphs.program import Program
from graphs.weights import NamedWeights
from quant.recipe import Recipe
from quant.resolve import Resolved

#: the packages whose code computes an export
PACKAGES = ("graphs", "calibration", "quant", "runtimes", "export")


def digest(*parts: Any) -> str:
    """Of JSON values; of anything else, its text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def code() -> str:
    """Of vlmx itself, and the versions of whatever is installed."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(
        file for package in PACKAGES for file in (root / package).rglob("*") if file.suffix in {".py", ".toml"}
    )
    sources = {str(file.relative_to(root)): sha256(file) for file in files}
    return digest(sources, sorted((d.name, d.version) for d in distributions()), platform.python_version())


def companions(model: Model) -> dict[str, str]:
    """Of a checkpoint's configuration, tokenizer and preprocessor files."""
    if model.directory is None:
        return {}
    found = (model.directory / place / name for place in (".", *SECOND) for name in (CONFIG, *COMPANIONS))
    return {str(path.relative_to(model.directory)): sha256(path) for path in found if path.is_file()}


def samples(calibration: Calibration) -> str:
    """Of the data that a recipe calibrates with: the samples that are drawn of it, or the file of statistics."""
    if calibration.data.endswith(SUFFIX):
        return sha256(Path(calibration.data))
    rows: list[Any] = [calibration.count, calibration.seed]
    if calibration.data != "zoo":  # that is generated, by what `code` covers
        for sample in open_samples(calibration.data, calibration.count, calibration.seed):
            pictures = [(p.mode, p.size, hashlib.sha256(p.tobytes()).hexdigest()) for p in sample.images]
            rows.append([sample.question, sample.answer, pictures])
    return digest(rows)


class Content:
    """Digests of what one export is made of. Those of the weights are computed by a thread, beside other work.

    A context manager: at its end the thread stops.
    """

    def __init__(self, model: Model, passes: Sequence[Pass], target: str, extra: Mapping[str, str]) -> None:
        request = {key: value for key, value in asdict(model.request).items() if key != "checkpoint"}
        self.source = digest(code(), request, model.variant, companions(model), write(passes), digests(passes))
        self.target = digest(self.source, target, dict(extra))
        self.computed = bool(passes)  # then constants may be made of any weight
        assert isinstance(model.weights, NamedWeights)
        self.pool = ThreadPoolExecutor(1, "digests")
        self.weights: dict[str, Future[str]] = {
            name: self.pool.submit(model.weights.digest, name) for name in model.weights
        }

    def __enter__(self) -> Content:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pool.shutdown(cancel_futures=True)

    def of_weights(self, names: Iterable[str] | None = None) -> str:
        """Of some weights, or of all."""
        return digest([(name, self.weights[name].result()) for name in (self.weights if names is None else names)])

    def asked(self, recipe: Recipe, verify: str) -> str:
        """Of all but the weights and what statistics are made of."""
        return digest(self.target, repr(recipe), verify)

    def statistics(self, calibration: Calibration, hessians: bool) -> str:
        """Of the statistics that calibrating with it collects."""
        return digest(self.source, self.of_weights(), samples(calibration), hessians)

    def lowered(
        self, program: Program, methods: Iterable[str], resolved: Resolved, statistics: str | None, *given: Any
    ) -> str:
        """Of the files that a target makes of some methods of the float program, besides `given`.

        `statistics`: what the method of that name said of those that the recipe reads.
        """
        parts: list[Any] = []
        for method in methods:
            own, names = resolved.of(method), set(program.methods[method].weight_names.values())
            choices = [(entry, str(scheme), repr(rule)) for (_, entry), (_, scheme, rule) in own.layers.items()]
            read = sorted(self.weights if self.computed else names & self.weights.keys())
            parts += [method, self.of_weights(read), choices, own.needs_statistics and statistics]
        whole = {name: getattr(resolved, name) for name in ("floats", "cast", "kv_cache", "symmetric")}
        return digest(self.target, parts, whole, resolved.recipe.modality, given)
