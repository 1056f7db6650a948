"""Builds small ML programs with coremltools, saves them, and opens the saved packages with the reference evaluator."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtimes.base import Array
from runtimes.mil.model import MilModel

with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import coremltools as ct
    from coremltools.converters import mil
    from coremltools.converters.mil.mil import types

    logging.disable(logging.NOTSET)

mb = mil.Builder

__all__ = ["Case", "check", "ct", "mb", "save", "types"]

#: an operator as coremltools builds it, and the same in torch
Case = tuple[Callable[..., Any], Callable[..., Any]]

FLOATS = {"fp16": types.fp16, "fp32": types.fp32}


def save(path: Path, inputs: Mapping[str, Any], body: Callable[..., Any]) -> MilModel:
    """The saved program `body(mb variables)` over inputs by name (a TensorSpec or StateTensorSpec each), opened again.

    No optimisation pass runs, so that the package holds the operators that `body` names.
    """
    names = ", ".join(inputs)
    scope: dict[str, Any] = {"body": body}
    exec(f"def main({names}):\n    return body({names})", scope)  # coremltools reads parameter names from the function
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = mb.program(input_specs=list(inputs.values()), opset_version=ct.target.iOS18)(scope["main"])
        ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            pass_pipeline=ct.PassPipeline.EMPTY,
            package_dir=str(path),
            skip_model_load=True,
        )
    return MilModel(path)


def check(path: Path, cases: Sequence[Case], arrays: Mapping[str, Array], tolerance: float = 1e-5) -> None:
    """Every case, in one package, gives what torch gives on the same inputs."""
    specs = {
        name: mb.TensorSpec(array.shape, types.numpy_type_to_builtin_type(array.dtype))
        for name, array in arrays.items()
    }

    def body(*variables: Any) -> Any:
        outputs = []
        for build, _ in cases:
            built = build(*variables)
            for output in built if isinstance(built, list | tuple) else (built,):
                plain = output.dtype in (types.fp32, types.int32)
                outputs.append(mb.identity(x=output) if plain else mb.cast(x=output, dtype="fp32"))
        return tuple(outputs)

    results = list(save(path, specs, body)(arrays).values())
    expected: list[Tensor] = []
    for _, reference in cases:
        given = reference(*(torch.from_numpy(array) for array in arrays.values()))
        expected += list(given) if isinstance(given, list | tuple) else [given]
    assert len(results) == len(expected)
    for number, (result, tensor) in enumerate(zip(results, expected, strict=True)):
        assert list(result.shape) == list(tensor.shape), f"output {number}"
        np.testing.assert_allclose(
            result, tensor.numpy(), rtol=tolerance, atol=tolerance, err_msg=f"output {number}", equal_nan=False
        )
