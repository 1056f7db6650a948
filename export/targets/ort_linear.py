"""Linear layers with quantized weights as ONNX Runtime's `MatMulNBits`: 4 or 8 bits, packed, with scales in blocks.

Its kernel at accuracy level 4 quantizes each block of the activations by the largest magnitude over 127, which is
`vlmx::quantize_per_block`; at level 0 it multiplies in float. Where weights have one scale a row, that scale is
repeated for the longest blocks it knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from export.targets.onnx_qdq import Spelling
from export.targets.onnx_quant_ops import attribute
from export.targets.onnx_weights import derived
from export.targets.ort_patterns import MICROSOFT, Linear, linears

BLOCKS = (256, 128, 64, 32, 16)
#: of the operator: multiply in float, or in int8 with blocks of activations quantized on the way
IN_FLOAT, IN_INT8 = 0, 4


def block_of(inputs: int, group: int) -> int:
    """The operator's block for rows of `inputs`: the group, or the longest that divides, or one that is padded."""
    return group or next((block for block in BLOCKS if inputs % block == 0), 32)


@dataclass(frozen=True)
class Blocks:
    """How one weight [O, K] is stored: unsigned integers of `bits`, `size` to a scale."""

    bits: int
    size: int
    inputs: int

    @property
    def count(self) -> int:
        return -(-self.inputs // self.size)

    def unsigned(self, values: Tensor) -> Tensor:
        """Signed to unsigned integers: zero becomes the middle."""
        return values.view(torch.uint8) + (1 << (self.bits - 1))  # modulo 256

    def pairs(self, values: Tensor) -> Tensor:
        """Two integers of 4 bits a byte along the last axis, the first one low; wider ones as they are."""
        if self.bits == 8:
            return values
        even = torch.nn.functional.pad(values, (0, 1)) if values.shape[-1] % 2 else values
        return even[..., 0::2] | (even[..., 1::2] << 4)

    def weight(self, q: Tensor) -> Tensor:
        """int8 [O, K] to bytes [O, blocks, size * bits / 8]; what pads the last block meets no activation."""
        padding = self.count * self.size - self.inputs
        padded = torch.nn.functional.pad(self.unsigned(q), (0, padding)) if padding else self.unsigned(q)
        return self.pairs(padded.unflatten(-1, (self.count, self.size)))

    def scale(self, scale: Tensor) -> Tensor:
        """[O, blocks], from [O, blocks] or [O, 1]."""
        return scale.expand(-1, self.count)

    def zero_point(self, zero: Tensor) -> Tensor:
        """Bytes [O, blocks * bits / 8]."""
        return self.pairs(self.unsigned(zero.expand(-1, self.count)))


def fuse_linear(model: ir.Model) -> None:
    """Put `MatMulNBits` for every linear layer with integer weights whose activations its kernels can take."""
    for layer in linears(model):
        activations = readable(layer)
        if activations is not None:
            replace(model.graph, layer, *activations)


def readable(layer: Linear) -> tuple[ir.Value, int] | None:
    """What the operator reads in place of the layer's input, and its accuracy level.

    None where that input is quantized in a way of its own: there are other kernels for that.
    """
    made = layer.x.producer()
    if made is None or made.op_type not in ("Dequantize", "DequantizeLinear"):
        return layer.x, IN_FLOAT
    source = made.inputs[0].producer() if made.inputs[0] is not None else None
    if source is None or source.op_type != "QuantizePerBlock" or attribute(source, "group") != layer.group:
        return None
    floats = source.inputs[0]
    assert floats is not None
    return floats, IN_INT8


def replace(graph: ir.Graph, layer: Linear, x: ir.Value, level: int) -> None:
    """Put the operator in place of the layer."""
    outputs, inputs = layer.shape
    blocks = Blocks(8 if layer.bits > 4 else 4, block_of(inputs, layer.group), inputs)
    parts = [
        derived(graph, layer.q, f"{blocks.bits}bit", blocks.weight, ir.DataType.UINT8),
        derived(graph, layer.scale, "blocks", blocks.scale),
        None if layer.zero is None else derived(graph, layer.zero, "blocks", blocks.zero_point, ir.DataType.UINT8),
        None,
        layer.bias,
    ]
    while parts[-1] is None:
        parts.pop()
    spell = Spelling(graph, layer.product)
    sizes = {"K": inputs, "N": outputs, "bits": blocks.bits, "block_size": blocks.size}
    layer.replace(spell, spell.op("MatMulNBits", x, *parts, domain=MICROSOFT, accuracy_level=level, **sizes))
    graph.opset_imports.setdefault(MICROSOFT, 1)
