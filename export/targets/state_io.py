"""State made explicit: a method's cache buffers become inputs and outputs, for targets whose graphs keep no memory.

The names follow what ONNX decoders commonly use: `past_key_values.N.key` goes in, `present.N.key` comes out.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec
from torch.fx import Graph, Node

from graphs.lift import copied, rebuilt
from graphs.program import Program, Signature, TracedMethod

#: the pattern of a state's name, the input that carries it in, the output that carries it out; the first match holds
NAMES: tuple[tuple[str, str, str], ...] = (
    (r"layers\.(\d+)\.cache\.k", r"past_key_values.\1.key", r"present.\1.key"),
    (r"layers\.(\d+)\.cache\.v", r"past_key_values.\1.value", r"present.\1.value"),
    (r"(.+)", r"past.\1", r"present.\1"),
)


def io_names(state: str) -> tuple[str, str]:
    """The names of the input and the output that carry the state called `state`."""
    pattern, past, present = next(rule for rule in NAMES if re.fullmatch(rule[0], state))
    return re.sub(pattern, past, state), re.sub(pattern, present, state)


def explicit_state(program: Program) -> Program:
    """`program` with `state_as_io` applied to every method that owns state."""
    for name, traced in program.methods.items():
        if traced.signature.state:
            program = program.replace(name, state_as_io(traced))
    return program


def state_pairs(signature: Signature) -> dict[str, str]:
    """Input to output, for the state that `state_as_io` made explicit in this signature."""
    outputs = {spec.name for spec in signature.outputs}
    pairs = {s.name: re.sub(r"^past(_key_values)?\.", "present.", s.name) for s in signature.inputs}
    return {past: present for past, present in pairs.items() if past != present and present in outputs}


def state_as_io(traced: TracedMethod) -> TracedMethod:
    """The same computation, with state passed in after the inputs and handed out after the outputs.

    The graph must be functional (state written through the signature's buffer mutations, as `graphs.trace` leaves it).
    """
    signature, exported = traced.signature, traced.exported
    order = [spec.name for spec in signature.state]
    graph_module, old = copied(exported)
    graph = graph_module.graph

    held = [spec for spec in old.input_specs if spec.target in order]
    held.sort(key=lambda spec: order.index(str(spec.target)))
    move_last(graph, [spec.arg.name for spec in held])
    inputs = [spec for spec in old.input_specs if spec.target not in order]
    inputs += [InputSpec(InputKind.USER_INPUT, spec.arg, None) for spec in held]

    nodes = {node.name: node for node in graph.output_node().args[0]}  # type: ignore[union-attr]
    given = [spec for spec in old.output_specs if spec.kind is not OutputKind.BUFFER_MUTATION]
    written = {spec.target: spec for spec in old.output_specs if spec.kind is OutputKind.BUFFER_MUTATION}
    outputs = given + [OutputSpec(OutputKind.USER_OUTPUT, written[name].arg, None) for name in order]
    graph.output_node().args = (tuple(nodes[spec.arg.name] for spec in outputs),)
    graph_module.recompile()

    explicit = Signature(
        signature.inputs + tuple(replace(spec, name=io_names(spec.name)[0]) for spec in signature.state),
        signature.outputs + tuple(replace(spec, name=io_names(spec.name)[1]) for spec in signature.state),
    )
    weights = {entry: weight for entry, weight in traced.weight_names.items() if entry not in order}
    held_on = {name: value for name, value in exported.state_dict.items() if name not in order}
    stateless = rebuilt(exported, graph_module, ExportGraphSignature(inputs, outputs), held_on)
    return TracedMethod(explicit, stateless, weights)


def move_last(graph: Graph, names: list[str]) -> None:
    """Put the placeholders called `names`, in this order, after all others."""
    placeholders: dict[str, Node] = {node.name: node for node in graph.find_nodes(op="placeholder")}
    for name in names:
        last = graph.find_nodes(op="placeholder")[-1]
        if placeholders[name] is not last:
            last.append(placeholders[name])
