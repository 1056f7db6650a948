"""The operators `vlmx::*` in a translated graph: one node each, of the domain `vlmx`, until a target spells them.

A target first looks for what it has fused operators for, then has `onnx_qdq.standardize` spell the rest in standard
ONNX: no node of this domain is ever written to a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

import quant.ops  # noqa: F401  (defines torch.ops.vlmx)

DOMAIN = "vlmx"
ANY = ["tensor(float)", "tensor(float16)", "tensor(int8)", "tensor(float8e4m3fn)"]
vlmx = torch.ops.vlmx


def parameter(name: str, kind: str) -> OpSchema.FormalParameter:
    """A formal parameter with a type of its own; `?` after its name makes it optional."""
    options = OpSchema.FormalParameterOption
    return OpSchema.FormalParameter(
        name.rstrip("?"), kind, param_option=options.Optional if name.endswith("?") else options.Single
    )


def operator(name: str, inputs: str, outputs: str, attributes: str = "") -> Any:
    """An operator of the domain from the names of its inputs, outputs and integer attributes."""
    taken = [parameter(text, f"T{index}") for index, text in enumerate(inputs.split())]
    given = [parameter(text, f"U{index}") for index, text in enumerate(outputs.split())]
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=taken,
        outputs=given,
        type_constraints=[(each.type_str, ANY, "") for each in [*taken, *given]],
        attributes=[OpSchema.Attribute(text, OpSchema.AttrType.INT, "") for text in attributes.split()],
    )
    return Op(Opset(DOMAIN, 1), name, schema)


DEQUANTIZE = operator("Dequantize", "q scale zero_point?", "x", "bits group")
QUANTIZE = operator("Quantize", "x scale zero_point?", "q", "to")
QUANTIZE_PER_TOKEN = operator("QuantizePerToken", "x", "q scale zero_point")
QUANTIZE_PER_BLOCK = operator("QuantizePerBlock", "x", "q scale", "group")


def dequantize(q: Any, scale: Any, zero_point: Any, bits: int, group: int) -> Any:
    """(q - zero_point) * scale."""
    return DEQUANTIZE(q, scale, zero_point, bits=bits, group=group)


def quantize(x: Any, scale: Any, zero_point: Any, dtype: int) -> Any:
    """x / scale + zero_point; `dtype` is ONNX's number of the type."""
    return QUANTIZE(x, scale, zero_point, to=int(dtype))


def quantize_per_token(x: Any) -> Sequence[Any]:
    """Integers, scales and zero points over the last axis."""
    made: Sequence[Any] = QUANTIZE_PER_TOKEN(x)
    return made


def quantize_per_block(x: Any, group: int) -> Sequence[Any]:
    """Integers and scales over blocks of the last axis."""
    made: Sequence[Any] = QUANTIZE_PER_BLOCK(x, group=group)
    return made


#: for the `custom_translation_table` of torch.onnx.export
QUANT_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    vlmx.dequantize.default: dequantize,
    vlmx.quantize.default: quantize,
    vlmx.quantize_per_token.default: quantize_per_token,
    vlmx.quantize_per_block.default: quantize_per_block,
}


def attribute(node: ir.Node, name: str) -> int:
    """An integer attribute."""
    return node.attributes[name].as_int()


def inputs_of(node: ir.Node, count: int) -> list[ir.Value | None]:
    """The inputs of a node, absent ones as None."""
    return [*node.inputs, *[None] * count][:count]
