"""Reshapes of state that copy nothing: a cache is read where it lies, however large its context.

Inside of a delegate a reshape is a copy: of a cache that is all of its context, at each call, however few tokens are in
it. Outside it is the same memory under another shape, so `xnnpack` leaves it there. ExecuTorch 1.4.1 plans it in the
memory of what it reads, which for an operator that writes in place is memory that nobody fills; `ViewsOfState` has it
read the buffer.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult


def xnnpack() -> Any:
    """XNNPACK's partitioner, without reshapes of state."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import ViewCopyConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class Reshapes(ViewCopyConfig):
        def check_constraints(self, node: Any, ep: Any) -> bool:
            state = ep.graph_signature.buffers_to_mutate
            return node.args[0].name not in state and super().check_constraints(node, ep)

    return XnnpackPartitioner([Reshapes if config is ViewCopyConfig else config for config in ALL_PARTITIONER_CONFIGS])


class ViewsOfState(PassBase):
    """Reshapes of what an operator wrote in place read the buffer that it wrote to; they stay behind it."""

    def call(self, graph_module: GraphModule) -> PassResult:
        from executorch.exir.dialects._ops import ops

        found = [
            (view, written)
            for view in graph_module.graph.find_nodes(op="call_function", target=ops.edge.aten.view_copy.default)
            if (written := view.args[0]).target is ops.edge.aten.index_put_.default
        ]
        for view, written in found:
            assert isinstance(written.args[0], Node)
            view.replace_input_with(written, written.args[0])
        graph_module.recompile()
        return PassResult(graph_module, bool(found))
