"""An ONNX file to a TensorRT engine, by whichever of the two libraries was chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from export.memory import large_blocks_returned
from export.targets.trt_parse import parsed
from graphs.errors import GateError, UserError, nearest
from graphs.program import Signature
from graphs.spec import Dim
from runtimes.cuda import gpu_name
from runtimes.tensorrt_api import LIBRARIES, Library, collecting_logger

Progress = Callable[[str], None]

#: a prefill of this length is what kernels are tuned for: an image's tokens or a question's
TYPICAL_LENGTH = 128

#: memory that one layer may use for intermediate results
WORKSPACE_BYTES = 1 << 30

#: layers whose operands tell what a network computes in, and how many of their inputs are operands
READ = {"MATRIX_MULTIPLY": 2, "CONVOLUTION": 2, "GATHER": 1}

#: bytes at the start of an engine that its runtime compares: the magic word and the version
HEADER_BYTES = 16


@dataclass(frozen=True)
class Profile:
    """The sizes that one set of kernels is made for: least, typical and most of each dynamic dimension."""

    name: str
    sizes: dict[str, tuple[int, int, int]]

    def shape(self, shape: Sequence[int | Dim], which: int) -> tuple[int, ...]:
        """`shape` at its least (0), typical (1) or most (2) sizes."""
        return tuple(size if isinstance(size, int) else self.sizes[size.name][which] for size in shape)


def profiles_of(signature: Signature, library: Library) -> tuple[Profile, ...]:
    """The whole range, and `decode`, one step at a time, if `library` makes its kernels when it builds; none where
    every size is fixed."""
    dims = {dim.name: dim for spec in signature.inputs for dim in spec.dims}
    if not dims:
        return ()
    typical = {name: max(dim.min, min(dim.max, TYPICAL_LENGTH)) for name, dim in dims.items()}
    whole = {name: (dim.min, typical[name], dim.max) for name, dim in dims.items()}
    if library.specializes:
        return (Profile("all", whole),)
    return Profile("prefill", whole), Profile("decode", {name: (dim.min,) * 3 for name, dim in dims.items()})


def choose_builder(name: str) -> tuple[Library, Any]:
    """The library called `name` and its module; `auto` is full TensorRT where it can build, else TensorRT-RTX.

    Raises UserError where the name is unknown or the library is missing or lacks the GPU that it needs.
    """
    if name == "auto":
        full = LIBRARIES["tensorrt"]
        module = full.load() if gpu_name() else None
        return (full, module) if module is not None else choose_builder("tensorrt-rtx")
    if name not in LIBRARIES:
        raise UserError(f"unknown builder '{name}': {nearest(name, ['auto', *LIBRARIES])}")
    library = LIBRARIES[name]
    module = library.load()
    if module is None:
        others = [other.name for other in LIBRARIES.values() if other is not library and other.load() is not None]
        raise UserError(f"builder '{name}' is not installed ({library.install}); here is {', '.join(others) or 'none'}")
    if not library.builds_without_gpu and gpu_name() is None:
        raise UserError(f"builder '{name}' needs an NVIDIA GPU and there is none here; choose 'tensorrt-rtx'")
    return library, module


@dataclass(frozen=True)
class Engine:
    """What a build wrote: its size in bytes, the first of them, how many layers its network had, what the library
    warned of, and how many products read numbers of which dtypes (`arithmetic`)."""

    size: int
    header: bytes
    layers: int
    arithmetic: dict[str, int]
    warnings: list[str]


def build_engine(
    library: Library,
    trt: Any,
    path: Path,
    out: Path,
    signature: Signature,
    profiles: Sequence[Profile],
    progress: Progress,
) -> Engine:
    """Parse the ONNX file and build a strongly typed engine, written to `out`: every number in the graph's dtype.

    Raises GateError naming the node or the reason where the library refuses.
    """
    logger = collecting_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32: TF32 keeps 10 bits of the mantissa
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    monitor = phase_reporter(trt, progress)
    config.progress_monitor = monitor
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for spec in signature.inputs:
            if spec.dims:
                shapes.set_shape(spec.name, *(profile.shape(spec.shape, which) for which in range(3)))
        config.add_optimization_profile(shapes)
    with parsed(trt, network, logger, library.title, path), large_blocks_returned(), out.open("wb") as file:
        built = builder.build_serialized_network_to_stream(network, config, stream_writer(trt, file))
        layers, products = network.num_layers, arithmetic(trt, network)
    if not built:
        raise GateError(f"{library.title} cannot build {path.name}: {'; '.join(logger.errors) or 'no reason given'}")
    with out.open("rb") as file:
        header = file.read(HEADER_BYTES)
    return Engine(out.stat().st_size, header, layers, products, list(logger.warnings))


def stream_writer(trt: Any, file: BinaryIO) -> Any:
    """Takes an engine's bytes as the library hands them out: memory never holds them all."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return file.write(data)

    return Writer()


def arithmetic(trt: Any, network: Any) -> dict[str, int]:
    """How many matrix products, convolutions and gathers of a parsed network read numbers of which dtypes.

    `matrix_multiply int8 x int4`: activations of int8, weights of int4. What a dequantize layer makes counts as what it
    reads, as the library fuses it into its reader; a layer that holds its weights itself names one dtype.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(n).name: layer for layer in layers for n in range(layer.num_outputs)}

    def kept_as(tensor: Any) -> str:
        maker = makers.get(tensor.name)
        while maker is not None and maker.type in (trt.LayerType.SHUFFLE, trt.LayerType.IDENTITY):
            tensor = maker.get_input(0)
            maker = makers.get(tensor.name)
        if maker is not None and maker.type == trt.LayerType.DEQUANTIZE:
            tensor = maker.get_input(0)
        return str(tensor.dtype.name).lower()

    kinds = {getattr(trt.LayerType, name): count for name, count in READ.items()}
    return dict(
        Counter(
            f"{layer.type.name.lower()} {' x '.join(kept_as(layer.get_input(n)) for n in range(inputs))}"
            for layer in layers
            for inputs in [min(kinds.get(layer.type, 0), layer.num_inputs)]
            if inputs
        ).most_common()
    )


def phase_reporter(trt: Any, progress: Progress) -> Any:
    """A progress monitor that reports the outer phases of a build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outer: set[str] = set()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outer.add(phase)
            elif parent in self.outer:
                progress(f"  {phase.lower()}")

        def step_complete(self, phase: str, step: int) -> bool:
            return True

        def phase_finish(self, phase: str) -> None:
            self.outer.discard(phase)

    return Monitor()
