"""`vlmx` quantization as the `quantized_decomposed` operators whose patterns XNNPACK and ExecuTorch have kernels for.

XNNPACK's partitioner reads a layer's precision off what stands before and behind it. A linear layer between
`choose_qparams_per_token_asymmetric`, `quantize_per_token`, `dequantize_per_token` and a weight dequantized per channel
runs as qd8_f32_qc8w or qd8_f32_qc4w, dequantized in groups as qd8_f32_qb4w; a linear layer or a convolution between
`dequantize_per_tensor` and `quantize_per_tensor` as qs8_qc8w. Rows of a quantized embedding are gathered and
dequantized by one kernel of ExecuTorch's quantized library, which its clients for language models link.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphs.errors import UserError
from graphs.program import Constant, Program
from graphs.rewrite import Opened
from quant.ops import INT8_MAX, INT8_MIN, TINY

vlmx = torch.ops.vlmx
aten = torch.ops.aten
INT8 = (INT8_MIN, INT8_MAX, torch.int8)
#: groups of 4-bit weights in XNNPACK are made of so many
GROUP = 32


def decomposed() -> Any:
    """The operators, defined by torch and by ExecuTorch's quantized kernels."""
    import executorch.kernels.quantized  # noqa: F401
    from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401
    from torch.ao.quantization.fx import _decomposed  # noqa: F401

    return torch.ops.quantized_decomposed


def pack4(q: Tensor) -> Tensor:
    """Two values of [-8, 8) a byte, offset by 8, the first in the high bits: int8 [O, K] to uint8 [O, K/2]."""
    high, low = (q.to(torch.int16) + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return high << 4 | low


def translate(program: Program) -> Program:
    """`program` without `vlmx` operators; it computes the same. Raises UserError where a weight has no kernel."""
    for method, traced in program.methods.items():
        calls = traced.exported.graph.nodes
        if any(str(node.target).startswith("vlmx.") for node in calls):
            opened = Opened.open(program, method)
            Translator(opened).run()
            program = opened.lift()
    return program


class Translator:
    """Changes one opened method."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.graph = opened.graph
        self.traced = opened.program.methods[opened.method]
        self.ops = decomposed()

    def run(self) -> None:
        replacements: dict[Any, Callable[[fx.Node], fx.Node | None]] = {
            vlmx.quantize.default: self.quantize,
            vlmx.quantize_per_token.default: self.quantize_per_token,
            vlmx.quantize_per_block.default: self.quantize_per_block,
            vlmx.dequantize.default: self.dequantize,
        }
        for node in list(self.graph.nodes):
            if node.target in replacements:
                with self.graph.inserting_before(node):
                    made = replacements[node.target](node)
                if made is not None:
                    node.replace_all_uses_with(made)
                    self.graph.erase_node(node)
            elif node.target is vlmx.palette.default:
                raise UserError(f"executorch has no kernel for the palette of '{self.entry(node.args[0])}'")
        self.opened.drop_unread()

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def give(self, node: fx.Node, parts: tuple[fx.Node, ...]) -> None:
        """Exchange the results of a node that has several."""
        for user in list(node.users):
            index: Any = user.args[1]
            user.replace_all_uses_with(parts[index])
            self.graph.erase_node(user)
        self.graph.erase_node(node)

    def entry(self, node: fx.Node) -> str:
        return str(node.target)

    def constant(self, node: fx.Node, suffix: str, change: Callable[[Tensor], Tensor]) -> fx.Node:
        """A buffer made of the one that `node` reads, computed when it is asked for."""
        entry = self.entry(node)
        name = self.traced.weight_names[entry]
        program = self.opened.program
        value: Constant = lambda: change(program.value(name))  # noqa: E731
        like = change(torch.empty(self.traced.exported.state_dict[entry].shape, dtype=node.meta["val"].dtype))
        return self.opened.constant(
            f"{entry}_{suffix}", value, tuple(like.shape), like.dtype, f"{self.opened.method}.{name}.{suffix}"
        )

    def scalars(self, scale: fx.Node, zero_point: fx.Node | None) -> tuple[float, int]:
        """The numbers of a static quantization: XNNPACK's patterns hold them as arguments."""
        numbers = [
            0 if node is None else self.opened.program.tensor(self.opened.method, self.entry(node)).item()
            for node in (scale, zero_point)
        ]
        return float(numbers[0]), int(numbers[1])

    def quantize(self, node: fx.Node) -> fx.Node:
        arguments: tuple[Any, ...] = node.args
        x, scale, zero_point, dtype = arguments
        if dtype is not torch.int8:
            raise UserError(f"executorch has no kernel for activations in {dtype}: int8 has")
        return self.call(self.ops.quantize_per_tensor.default, x, *self.scalars(scale, zero_point), *INT8)

    def quantize_per_token(self, node: fx.Node) -> None:
        x = node.args[0]
        chosen = self.call(self.ops.choose_qparams_per_token_asymmetric.default, x, torch.int8)
        scale, zero_point = (self.call(operator.getitem, chosen, n) for n in range(2))
        parts = (self.call(self.ops.quantize_per_token.default, x, scale, zero_point, *INT8), scale, zero_point)
        self.give(node, parts)

    def quantize_per_block(self, node: fx.Node) -> None:
        """Plain arithmetic, but for rounding to int8, which XNNPACK does with a scale of one."""
        arguments: tuple[Any, ...] = node.args
        x, group = arguments
        rank, whole = x.meta["val"].dim(), group == x.meta["val"].shape[-1]
        blocks = x if whole else self.call(aten.unflatten.int, x, rank - 1, [-1, group])
        largest = self.call(aten.amax.default, self.call(aten.abs.default, blocks), [-1], True)
        scale = self.call(aten.clamp.default, self.call(aten.mul.Tensor, largest, 1 / INT8_MAX), TINY)
        scaled = self.call(aten.div.Tensor, blocks, scale)
        if not whole:
            scaled = self.call(aten.flatten.using_ints, scaled, rank - 1)
            scale = self.call(aten.squeeze.dim, scale, -1)
        parts = (self.call(self.ops.quantize_per_tensor.default, scaled, 1.0, 0, *INT8), scale)
        self.give(node, parts)

    def dequantize(self, node: fx.Node) -> fx.Node:
        arguments: tuple[Any, ...] = node.args
        q, scale, zero_point, bits, group = arguments
        if q.op == "get_attr":
            return self.weight(q, scale, zero_point, bits, group)
        if q.target is aten.embedding.default and q.args[0].op == "get_attr":
            return self.embedding(q, scale, zero_point, bits)
        if q.target is self.ops.quantize_per_token.default:
            return self.call(self.ops.dequantize_per_token.default, q, scale, zero_point, *INT8, torch.float32)
        if scale.op == "get_attr" and scale.meta["val"].dim() == 0:
            return self.call(self.ops.dequantize_per_tensor.default, q, *self.scalars(scale, zero_point), *INT8)
        return self.arithmetic(q, scale, zero_point, group)

    def weight(self, q: fx.Node, scale: fx.Node, zero_point: fx.Node | None, bits: int, group: int) -> fx.Node:
        """The weight of a linear layer or a convolution, one scale an output channel or a group of inputs."""
        least, most = -(1 << bits - 1), (1 << bits - 1) - 1
        if zero_point is not None or q.meta["val"].dtype is not torch.int8 or bits not in (4, 8):
            raise UserError(f"executorch has no kernel for the weight '{self.entry(q)}': w8 and w4 have")
        if not group:
            flat = self.constant(scale, "per_channel", torch.flatten)
            zeros = self.constant(scale, "zeros", lambda t: torch.zeros(t.numel(), dtype=torch.int64))
            target = self.ops.dequantize_per_channel.default
            return self.call(target, q, flat, zeros, 0, least, most, torch.int8)
        if bits != 4 or group % GROUP:
            raise UserError(f"executorch has no kernel for the groups of the weight '{self.entry(q)}': w4g32 has")
        zeros = self.constant(scale, "zeros", lambda t: torch.zeros_like(t, dtype=torch.int64))
        target = self.ops.dequantize_per_channel_group.default
        return self.call(target, q, scale, zeros, least, most, torch.int8, group, torch.float32)

    def embedding(self, rows: fx.Node, scales: fx.Node, zero_points: fx.Node | None, bits: int) -> fx.Node:
        """Rows of integers gathered and dequantized at once."""
        arguments: tuple[Any, ...] = (*rows.args[:2], scales.args[0])
        q, ids, scale = arguments
        if zero_points is not None or bits not in (4, 8):
            raise UserError(f"executorch has no kernel for the embedding '{self.entry(q)}': w8 and w4 have")
        if bits == 4:
            packed = self.constant(q, "packed", pack4)
            return self.call(self.ops.embedding_4bit.default, packed, scale, None, -8, 7, ids)
        return self.call(self.ops.embedding_byte.default, q, scale, None, INT8_MIN, INT8_MAX, ids)

    def arithmetic(self, q: fx.Node, scale: fx.Node, zero_point: fx.Node | None, group: int) -> fx.Node:
        """Integers that the graph computed, as those of a cache: XNNPACK converts them with a scale of one."""
        value = self.call(self.ops.dequantize_per_tensor.default, q, 1.0, 0, *INT8)
        rank, shape = q.meta["val"].dim(), q.meta["val"].shape
        if zero_point is not None:
            value = self.call(aten.sub.Tensor, value, self.call(aten.to.dtype, zero_point, torch.float32))
        if not group or group == shape[-1]:  # one scale a row broadcasts
            return self.call(aten.mul.Tensor, value, scale)
        blocks = self.call(aten.unflatten.int, value, rank - 1, [-1, group])
        made = self.call(aten.mul.Tensor, blocks, self.call(aten.unsqueeze.default, scale, -1))
        return self.call(aten.flatten.using_ints, made, rank - 1)
