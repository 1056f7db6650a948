"""Errors of one program or artefact against another on the same seeded inputs, and these as a bundle keeps them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from graphs.errors import UserError
from graphs.program import Program, Signature
from graphs.spec import Dim, TensorSpec
from runtimes.base import Array, Caller
from runtimes.eager import EagerRuntime


@dataclass(frozen=True)
class Call:
    """One call of a method: what went in and what came out. A stateful method's calls follow one another."""

    inputs: list[Array]
    outputs: list[Array]


Vectors = Mapping[str, Sequence[Call]]


def seeded_inputs(signatures: Mapping[str, Signature], seed: int = 0) -> dict[str, list[list[Array]]]:
    """For each method the inputs of one call, or of a prefill and some steps where it keeps state."""
    return {
        name: [[tensor.numpy() for tensor in call] for call in signature.method(name).examples(seed)]
        for name, signature in signatures.items()
    }


def record(runtime: Caller, inputs: Mapping[str, Sequence[Sequence[Array]]]) -> Vectors:
    """What `runtime` makes of `inputs`, each method beginning without state."""
    vectors = {}
    for method, calls in inputs.items():
        runtime.reset()
        vectors[method] = [Call(list(call), runtime.call(method, call)) for call in calls]
    return vectors


def record_eager(program: Program, inputs: Mapping[str, Sequence[Sequence[Array]]]) -> Vectors:
    """What torch makes of `inputs`, with one method's weights in memory at a time."""
    vectors = {}
    for method, calls in inputs.items():
        with closing(EagerRuntime(program)) as runtime:
            vectors[method] = record(runtime, {method: calls})[method]
    return vectors


def relative_l2(actual: Sequence[Array], expected: Sequence[Array]) -> float:
    """||actual - expected|| / ||expected|| over all arrays together, in float64; infinite where a shape differs."""
    if [a.shape for a in actual] != [e.shape for e in expected]:
        return math.inf
    difference = math.fsum(
        float(np.square(a.astype(np.float64) - e).sum()) for a, e in zip(actual, expected, strict=True)
    )
    norm = math.fsum(float(np.square(e.astype(np.float64)).sum()) for e in expected)
    error = math.sqrt(difference / norm) if norm else (0.0 if difference == 0 else math.inf)
    return error if math.isfinite(error) else math.inf


def sqnr_db(relative: float) -> float | None:
    """Signal to noise in decibels of a relative L2 error; None where there is no noise (or nothing but)."""
    return -20 * math.log10(relative) if 0 < relative < math.inf else None


def worst(actual: Sequence[Call], expected: Sequence[Call]) -> float:
    """The largest relative L2 error over the calls of a method."""
    return max(relative_l2(a.outputs, e.outputs) for a, e in zip(actual, expected, strict=True))


def compare(actual: Vectors, expected: Vectors) -> dict[str, dict[str, Any]]:
    """Relative L2 and SQNR by method."""
    errors = {method: worst(actual[method], calls) for method, calls in expected.items()}
    return {method: {"relative_l2": error, "sqnr_db": sqnr_db(error)} for method, error in errors.items()}


def compare_compressed(actual: Vectors, expected: Vectors) -> dict[str, dict[str, Any]]:
    """As `compare`; where the number of tokens [1, N, D] differs, of their means over N, which `of` then says."""
    entries = {}
    for method, calls in expected.items():
        pair = {method: actual[method]}, {method: calls}
        same = all(
            [o.shape for o in a.outputs] == [o.shape for o in e.outputs]
            for a, e in zip(actual[method], calls, strict=True)
        )
        found = compare(*pair) if same else compare(*map(mean_over_tokens, pair))
        entries[method] = {"of": "outputs" if same else "mean over tokens", **found[method]}
    return entries


def declared(arrays: Sequence[Array], specs: Sequence[TensorSpec]) -> list[Array]:
    """`arrays` without the channels that passes have put behind those of `specs`."""
    widths = [spec.shape[-1] for spec in specs]
    return [a[..., :width] if isinstance(width, int) else a for a, width in zip(arrays, widths, strict=True)]


def last_ones(arrays: Sequence[Array], before: Sequence[TensorSpec], after: Sequence[TensorSpec]) -> list[Array]:
    """`arrays` [1, tokens, D] of the last token alone where that is what passes have left of any number of them."""
    return [
        array[:, -1:] if len(old.shape) == 3 and isinstance(old.shape[1], Dim) and new.shape[1] == 1 else array
        for array, old, new in zip(arrays, before, after, strict=True)
    ]


def mean_over_tokens(vectors: Vectors) -> Vectors:
    """Every output [1, N, D] averaged over N."""
    return {
        method: [Call(call.inputs, [output.mean(1) for output in call.outputs]) for call in calls]
        for method, calls in vectors.items()
    }


def inputs_of(vectors: Vectors) -> dict[str, list[list[Array]]]:
    """What went into each call, to be put into another runtime."""
    return {method: [call.inputs for call in calls] for method, calls in vectors.items()}


def save_vectors(path: Path, vectors: Vectors) -> None:
    """Write test vectors as METHOD/CALL/in|out/INDEX."""
    save_file(
        {
            f"{method}/{number}/{side}/{index}": np.ascontiguousarray(array)
            for method, calls in vectors.items()
            for number, call in enumerate(calls)
            for side, arrays in (("in", call.inputs), ("out", call.outputs))
            for index, array in enumerate(arrays)
        },
        path,
    )


def load_vectors(path: Path, signatures: Mapping[str, Signature]) -> Vectors:
    """The inverse of `save_vectors`. Raises UserError where the file is damaged or a method has no vectors."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())

            def arrays(prefix: str) -> list[Array]:
                count = sum(name.startswith(prefix) for name in names)
                return [file.get_tensor(f"{prefix}{index}") for index in range(count)]

            vectors: dict[str, list[Call]] = {}
            for method in signatures:
                count = len({name.split("/")[1] for name in names if name.startswith(f"{method}/")})
                vectors[method] = [
                    Call(arrays(f"{method}/{n}/in/"), arrays(f"{method}/{n}/out/")) for n in range(count)
                ]
    except Exception as error:  # the library's own error type is not part of its public interface
        raise UserError(f"{path}: damaged test vectors: {error}") from error
    empty = [method for method, calls in vectors.items() if not calls]
    if empty:
        raise UserError(f"{path}: no test vectors for {', '.join(empty)}")
    return vectors


def program_signatures(program: Program) -> dict[str, Signature]:
    """The signatures of a program's methods."""
    return {name: traced.signature for name, traced in program.methods.items()}
