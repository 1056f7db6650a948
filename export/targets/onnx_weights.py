"""Initializers that are read from where they lie only while a file is written, in whatever layout the graph wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype
from torch import Tensor

from graphs.program import Program

#: two values a byte, the first in the low bits
NIBBLES = frozenset({ir.DataType.INT4, ir.DataType.UINT4})


def lazy(read: Callable[[], Tensor], dtype: ir.DataType, shape: ir.Shape, name: str | None) -> ir.LazyTensor:
    """A tensor that is read each time it is asked for, and kept by nobody. Integers of 4 bits are read as bytes."""

    def made() -> ir.TensorProtocol:
        tensor = read().contiguous()
        if dtype in NIBBLES:
            return ir.PackedTensor(pack(tensor).numpy(), dtype, shape=shape, name=name)
        return TorchTensor(tensor, name=name)

    return ir.LazyTensor(made, dtype=dtype, shape=shape, name=name)


def entry(program: Program, method: str, name: str, dtype: ir.DataType, shape: ir.Shape) -> ir.LazyTensor:
    """An entry of the method's state dict, copied where it is mapped, so that the checkpoint's pages may go."""
    computed = program.methods[method].weight_names.get(name) in program.constants
    stored_as = program.methods[method].exported.state_dict[name].dtype

    def read() -> Tensor:
        if computed:
            return program.tensor(method, name).detach()
        stored = program.stored(method, name).detach()
        copy = stored.to(stored_as, copy=True, memory_format=torch.contiguous_format)
        program.release(method, name)
        return copy

    return lazy(read, dtype, shape, name)


def pack(values: Tensor) -> Tensor:
    """Integers of 4 bits, signed or not, two a byte: uint8, ceil(numel/2)."""
    flat = values.flatten().view(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(flat.numel() % 2)])
    return (flat[0::2] & 15) | (flat[1::2] << 4)


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is an initializer that is read late."""
    return value is not None and isinstance(value.const_value, ir.LazyTensor)


def derived(
    graph: ir.Graph,
    source: ir.Value | Sequence[ir.Value],
    what: str,
    change: Callable[..., Tensor],
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """The initializer `<source>.<what>` of `graph`: `source` changed when it is written; made once, shared after that.

    Of several sources the first gives the name; `change` takes as many tensors. The shape is found on meta tensors. For
    4-bit types `change` gives one value a byte. The source itself goes with its last reader.
    """
    sources = [source] if isinstance(source, ir.Value) else source
    name = f"{sources[0].name}.{what}"
    if name in graph.initializers:
        return graph.initializers[name]
    tensors = [late(value) for value in sources]
    dtype = dtype or tensors[0].dtype
    shape = ir.Shape(tuple(change(*map(form, tensors)).shape))
    reads = [tensor.raw for tensor in tensors]
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
    value.const_value = lazy(lambda: change(*(plain(read()) for read in reads)), dtype, shape, name)
    graph.register_initializer(value)
    return value


def late(value: ir.Value) -> ir.LazyTensor:
    """What holds an initializer that is read late."""
    assert isinstance(value.const_value, ir.LazyTensor)
    return value.const_value


def form(tensor: ir.LazyTensor) -> Tensor:
    """A tensor of its shape and dtype that holds nothing."""
    sizes = [size for size in tensor.shape if isinstance(size, int)]
    return torch.empty(sizes, dtype=to_torch_dtype(tensor.dtype), device="meta")


def turn(value: ir.Value) -> None:
    """Let a matrix that is read late be its transpose, under the same name."""
    tensor = late(value)
    read, shape = tensor.raw, ir.Shape(tuple(reversed(tensor.shape)))
    value.const_value = lazy(lambda: plain(read()).T, tensor.dtype, shape, value.name)
    value.shape = shape


def plain(tensor: ir.TensorProtocol) -> Tensor:
    """What a late-read tensor that is not packed holds."""
    assert isinstance(tensor, TorchTensor)
    held: Tensor = tensor.raw
    return held
