"""Logits of the last token alone: all that generation reads of a prompt.

A head of V words costs as much as a layer or two of a small decoder, for each of a prompt's tokens; llama.cpp and
ExecuTorch's own exporter compute it for the last one by default. What is asked for one token at a time stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphs.compress.base import Pass
from graphs.dialogue import DECODER
from graphs.errors import UserError
from graphs.narrow import LINEAR, leaves
from graphs.program import Program
from graphs.rewrite import Opened
from graphs.spec import Dim


@dataclass(frozen=True)
class LastLogits(Pass):
    """`text_decoder` gives logits [1, 1, V], of the last of its tokens."""

    name = "last_logits"
    about = "last_logits{}: the decoder's head is computed for the last token of a call alone"

    def run(self, program: Program) -> Program:
        opened = Opened.open(program, DECODER)
        graph = opened.graph
        shapes = [spec.shape for spec in program.methods[DECODER].signature.outputs]
        heads = [node for node in graph.find_nodes(op="call_function", target=LINEAR) if leaves(node)]
        if len(heads) != 1 or len(shapes) != 1 or len(shapes[0]) != 3 or not isinstance(shapes[0][1], Dim):
            raise UserError(
                f"the graph has no place for last_logits: looked for one head behind which nothing is in '{DECODER}', "
                f"and logits [1, tokens, V] out of it; found {len(heads)}, and {', '.join(map(str, shapes))}"
            )
        head = heads[0]
        states = head.args[0]
        with graph.inserting_before(head):
            last = graph.call_function(torch.ops.aten.select.int, (states, 1, -1))
            made = graph.call_function(torch.ops.aten.unsqueeze.default, (last, 1))
        again, node = {states: made}, head
        while node.op != "output":  # copies, whose values are computed anew
            (user,) = node.users
            with graph.inserting_before(user):
                copy = graph.node_copy(node, lambda n: again.get(n, n))
            copy.meta = {key: value for key, value in node.meta.items() if key != "val"}
            again[node], node, before = copy, user, node
        node.replace_input_with(before, again[before])
        return opened.lift()


PASS = LastLogits
