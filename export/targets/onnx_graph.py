"""A Program's method as an ONNX graph whose weights are read only while its file is written.

The fake-weight ExportedProgram is translated by `torch.onnx`; each initializer then becomes a lazy tensor that asks the
Program for its weight, so memory stays near one tensor whatever the model's size.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch.export import ExportedProgram

from export.memory import trim
from export.targets.onnx_ops import TRANSLATIONS
from export.targets.onnx_overhead import spared
from export.targets.onnx_qdq import standardize
from export.targets.onnx_quant_ops import QUANT_TRANSLATIONS
from export.targets.onnx_weights import entry, is_weight, turn
from graphs.lift import copied, rebuilt
from graphs.program import Program, Signature

#: the first with blocked int4 Q/DQ, and with `Gelu`; later ones make ONNX Runtime no faster, TensorRT parses them all
OPSET = 21

#: an operator and which of its inputs -> the output that may be in the same buffer
OVERWRITES = {("ScatterND", 0): 0, ("GroupQueryAttention", 3): 1, ("GroupQueryAttention", 4): 2}

#: a change of the graph in place
Fusion = Callable[[ir.Model], None]

#: constants of at most this many elements are stored once; weights are larger and keep their names
SHARED_SIZE = 16

#: weights of fewer bytes stay inside the .onnx file
INLINE_BYTES = 1024


def emit(
    program: Program,
    method: str,
    fusions: Sequence[Fusion] = (),
    opset: int = OPSET,
    last_fusions: Sequence[Fusion] = (),
) -> ir.Model:
    """The ONNX model of one method, named as its signature says, its weights still unread.

    `fusions` put a target's own operators where quantized weights and activations (nodes of the domain `vlmx`, see
    `onnx_quant_ops`) allow them; what they leave becomes standard ONNX. `last_fusions` see that, simplified: nodes of
    constants are initializers there, and what is equal is one.
    The method must own no state (`state_io.explicit_state`).
    """
    traced = program.methods[method]
    signature = traced.signature
    try:
        model = translate(settled(traced.exported), signature, opset)
    except torch.onnx.errors.OnnxExporterError:  # an operator that has to be decomposed first
        model = translate(traced.exported, signature, opset)
    model.graph.name = method
    attach_weights(model, program, method)
    for fuse in fusions:
        fuse(model)
    common.RemoveUnusedNodesPass()(model)
    standardize(model)
    fold_transposes(model)
    simplify(model)
    if last_fusions:
        for fuse in last_fusions:
            fuse(model)
        tidy(model)
    name_dims(model, signature)
    strip_metadata(model)
    return model


class Settled(ExportedProgram):
    """A program of operators that all have a translation. Decomposing it takes 9/10 of the time and changes nothing."""

    def run_decompositions(self, *tables: object, **options: object) -> Settled:
        return self


def settled(exported: ExportedProgram) -> ExportedProgram:
    """A copy of `exported`, which its translation may change."""
    return rebuilt(exported, *copied(exported), exported.state_dict, Settled)


def translate(exported: ExportedProgram, signature: Signature, opset: int) -> ir.Model:
    """`exported` as torch's exporter writes it. Raises torch.onnx.errors.OnnxExporterError where it cannot."""
    with torch.no_grad(), warnings.catch_warnings(), spared():
        warnings.simplefilter("ignore")
        quiet = logging.getLogger("torch.onnx._internal.exporter._registration")  # torchvision is absent by design
        level = quiet.level
        quiet.setLevel(logging.ERROR)
        try:
            made = torch.onnx.export(
                exported,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                opset_version=opset,
                custom_translation_table={**TRANSLATIONS, **QUANT_TRANSLATIONS},
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        finally:
            quiet.setLevel(level)
    assert made is not None
    return made.model


def attach_weights(model: ir.Model, program: Program, method: str) -> None:
    """Make every initializer that stands for an entry of the method's state dict read it when asked."""
    entries = program.methods[method].exported.state_dict
    for name, value in model.graph.initializers.items():
        if name in entries and value.const_value is not None:
            shape = ir.Shape(tuple(entries[name].shape))
            value.const_value = entry(program, method, name, value.const_value.dtype, shape)


def fold_transposes(model: ir.Model) -> None:
    """Store a matrix that the graph uses only transposed as its transpose: it is turned when it is written."""
    for value in list(model.graph.initializers.values()):
        users = value.consumers()
        if not is_weight(value) or len(value.shape or ()) != 2 or not users:
            continue
        if any(node.op_type != "Transpose" for node in users):
            continue
        turn(value)
        for node in users:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            model.graph.remove(node, safe=True)


def simplify(model: ir.Model) -> None:
    """Fold what is constant, and tidy what that leaves."""
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True)
    tidy(model)


def tidy(model: ir.Model) -> None:
    """Drop what is unused, compute what is shared once."""
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=SHARED_SIZE),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def name_dims(model: ir.Model, signature: Signature) -> None:
    """Replace the tracer's symbols (`s29`) by the names of the signature's dimensions, in every shape of the graph."""
    names = {
        str(size.value): dim.name
        for value, spec in zip(model.graph.inputs, signature.inputs, strict=True)
        for size, dim in zip(value.shape or (), spec.shape, strict=True)
        if isinstance(size, ir.SymbolicDim) and not isinstance(dim, int)
    }
    values = [*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(size if isinstance(size, int) else renamed(size, names) for size in value.shape)


def renamed(size: ir.SymbolicDim, names: Mapping[str, str]) -> str | None:
    """A symbolic size, or an expression of some, in other names."""
    return None if size.value is None else re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.value)


def strip_metadata(model: ir.Model) -> None:
    """Drop what the exporter noted about its own run: stack traces carry the paths of the machine it ran on."""
    nodes = list(model.graph.all_nodes())
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(o for node in nodes for o in node.outputs)]
    items: list[Any] = [model, model.graph, *nodes, *values]
    for item in items:
        item.metadata_props.clear()
        item.doc_string = None


def write(model: ir.Model, path: Path) -> None:
    """Save `model` and, beside it in `<path>.data`, its weights, one in memory at a time; check the result."""
    trim()
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=INLINE_BYTES)
    onnx.checker.check_model(str(path), full_check=False)


def operators(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator the graph has, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.all_nodes()).most_common())


def in_place(model: ir.Model, pairs: Mapping[str, str]) -> list[str]:
    """The state inputs that only one node reads, which writes their output in place: one buffer may serve as both."""
    values = {value.name: value for value in [*model.graph.inputs, *model.graph.outputs]}
    return [past for past, present in pairs.items() if written_over(values[past], values[present])]


def written_over(past: ir.Value, present: ir.Value) -> bool:
    """Whether the one node that reads `past` makes `present` of it, and may do so in the same buffer."""
    node, uses = present.producer(), list(past.uses())
    if node is None or len(uses) != 1 or uses[0].node is not node:
        return False
    return OVERWRITES.get((node.op_type, uses[0].idx)) == node.outputs.index(present)
