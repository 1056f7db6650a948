"""ExecuTorch: one model.pte with all methods, their heavy parts run by XNNPACK, caches kept as mutable buffers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from export.layouts.executorch import constant_methods
from export.targets import executorch_attention, executorch_graph, executorch_grow, executorch_kernels, executorch_quant
from export.targets.attention_slices import slice_attention
from export.targets.base import Capabilities, Lowered, LowerOptions
from export.targets.executorch_delegates import Delegates, Prepared, fill, hollow
from graphs.errors import GateError, UserError, nearest
from graphs.files import reason, sha256
from graphs.program import Program
from graphs.shorten import shorten

FILE = "model.pte"


def xnnpack() -> Any:
    """XNNPACK's partitioner."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return XnnpackPartitioner()


#: what may take parts of the graph, by the name that `extra["delegate"]` gives; the first is the default
DELEGATES: dict[str, Callable[[], Any]] = {"xnnpack": xnnpack}


class ExecuTorchTarget:
    """Writes `model.pte` in the layout of the stock `MultimodalRunner`."""

    name = "executorch"
    capabilities = Capabilities(
        runs_on="CPUs of phones, boards and desktops, through XNNPACK",
        floats=("float32",),
        schemes={
            "linear": ("w8a8t", "w4a8t", "w4g32a8t", "w4g64a8t", "w4g128a8t", "w8a8o"),
            "conv": ("w8a8o",),
            "embedding": ("w8", "w4", "w8g32", "w4g32"),
        },
        kv_cache=("float", "int8"),
        base_bytes=760 << 20,
        scores=4.3,
        unmasked=4.3,
        sliced=True,
        held=1.3,  # the file's bytes are collected before they are written
    )

    def legalize(self, program: Program) -> Program:
        """Quantization in the forms that XNNPACK takes; `lower` sees to the rest, on the layers that it lowers."""
        return executorch_quant.translate(program)

    def lower(self, program: Program, directory: Path, options: LowerOptions) -> Lowered:
        """Raises UserError where `extra["delegate"]` is none of `DELEGATES`, GateError where ExecuTorch refuses."""
        delegate = options.extra.get("delegate", next(iter(DELEGATES)))
        if delegate not in DELEGATES:
            raise UserError(f"unknown delegate '{delegate}' of executorch: {nearest(delegate, DELEGATES)}")
        with quiet(), told(program):
            make = partial(write, program, directory / FILE, DELEGATES[delegate](), options)
            methods = options.piece(list(program), make)
        details = {"delegate": delegate, "methods": methods, "sha256": sha256(directory / FILE)}
        versions = {name: version(name) for name in ("executorch", "torch")}
        return Lowered(dict.fromkeys(program, FILE), details, versions)


def write(program: Program, path: Path, partitioner: Any, options: LowerOptions) -> dict[str, Any]:
    """Lower every method into one file at `path`; for each, what the delegate runs and what portable kernels do."""
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.delegate import executorch_call_delegate

    from export.targets.executorch_overhead import spared

    options.progress(f"lowering {', '.join(program)}")
    executorch_quant.decomposed()  # their kernels must be known where operators get their outputs planned
    constants = constant_methods(program.methods, options.metadata)
    stacks = {method: executorch_grow.runs(program, method) for method in program}
    with spared(), lowered(program, stacks, partitioner, constants, options.memo) as edge:
        kernels = {method: executorch_kernels.kernels(edge.exported_program(method).graph_module) for method in program}
        options.progress("planning memory")
        # Reinplacing writes new rows into the cache itself, not into a copy; names let a runtime find and zero it.
        planned = edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True, emit_mutable_buffer_names=True))
        options.progress(f"writing {path.name}")
        with path.open("wb") as file:
            planned.write_to_file(file)
    return {
        method: {
            **executorch_graph.operators(planned.exported_program(method).graph, executorch_call_delegate),
            "kernels": kernels[method],
        }
        for method in program
    }


@contextmanager
def lowered(
    program: Program,
    stacks: executorch_grow.Stacks,
    partitioner: Any,
    constants: Mapping[str, Any],
    prepared: dict[str, Prepared | None],
) -> Iterator[Any]:
    """All methods as ExecuTorch's edge programs: of `stacks` three layers are lowered, and the others made of them.

    `prepared`: of `Delegates`.
    """
    from executorch.exir import EdgeCompileConfig, EdgeProgramManager, to_edge_transform_and_lower

    short = shorten(program, executorch_grow.middle(stacks))
    legal = executorch_graph.legalize(slice_attention(executorch_attention.attend(short)))
    delegates = Delegates(legal, program, prepared)
    with delegates.used():
        edge = to_edge_transform_and_lower(
            {method: hollow(legal, method) for method in legal},
            partitioner=[partitioner],
            constant_methods=constants,
            compile_config=EdgeCompileConfig(_check_ir_validity=False),  # the gate runs what comes of it
        )
        methods = {}
        for method, runs in stacks.items():
            part = edge.exported_program(method)
            fill(part, legal, method)
            methods[method] = executorch_grow.Grower(method, part, program, delegates).run(runs)
    try:
        left = [method for method, grown in methods.items() if grown is None]  # lowered whole, if any
        rest = replace(program, methods={method: program.methods[method] for method in left})
        again = lowered(rest, {method: [] for method in left}, partitioner, constants, prepared)
        with again if left else nullcontext(edge) as whole:
            methods |= {method: whole.exported_program(method) for method in left}
            yield EdgeProgramManager(methods, constants, edge.compile_config)
    finally:
        delegates.forget()


@contextmanager
def told(program: Program) -> Iterator[None]:
    """Raise GateError for what ExecuTorch raises, of any type: with what its passes were told first."""
    try:
        yield
    except (UserError, GateError, OSError, MemoryError):
        raise
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        raise GateError(f"ExecuTorch cannot lower {', '.join(program)}: {reason(first)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings about torch's and ExecuTorch's own internals that every export gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


TARGET = ExecuTorchTarget()
