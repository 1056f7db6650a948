"""A traced vision encoder opened for change: new computation on its tokens, then traced anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from graphs.compress.place import COMPRESSION, GRID, LIST, compressions
from graphs.errors import UserError
from graphs.program import Program
from graphs.trace import trace_module

METHOD = "vision_encoder"


@dataclass(frozen=True)
class Encoder:
    """A program whose `vision_encoder` lies open as `module`, a copy with weights as attributes."""

    program: Program
    module: fx.GraphModule
    mode: FakeTensorMode

    @classmethod
    def open(cls, program: Program) -> Encoder:
        """Raises UserError where the program has no vision encoder."""
        if METHOD not in program.methods:
            raise UserError(f"the model has no place for this pass: no method '{METHOD}', only {', '.join(program)}")
        exported = program.methods[METHOD].exported
        module = exported.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        mode = next(t.fake_mode for t in exported.state_dict.values() if isinstance(t, FakeTensor))
        return cls(program, module, mode)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def splice(self, rule: nn.Module, tokens: fx.Node, more: Sequence[fx.Node] = (), *, grid: bool) -> Program:
        """The program with rule(tokens, *more) [1, M, D] where `tokens` [1, N, D] were used.

        `rule` is on real tensors; its buffers become constants of the program. `grid`: whether its tokens are a square
        in raster order.
        """
        name = f"{COMPRESSION}_{len(compressions(self.graph))}_{GRID if grid else LIST}"
        constants = {entry: buffer.detach().clone() for entry, buffer in rule.state_dict().items()}
        with self.mode:
            for entry, buffer in list(rule.named_buffers()):
                setattr(rule, entry, self.mode.from_tensor(buffer))
        self.module.add_module(name, rule)
        last = max((tokens, *more), key=list(self.graph.nodes).index)
        with self.graph.inserting_after(last):
            call = self.graph.call_module(name, (tokens, *more))
        tokens.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
        self.module.recompile()
        return self.retrace({f"{name}.{entry}": value for entry, value in constants.items()})

    def retrace(self, constants: dict[str, Tensor]) -> Program:
        """The program with the changed graph traced anew, its outputs declared as they are now."""
        traced = self.program.methods[METHOD]
        signature = traced.signature
        exported = trace_module(self.module, signature.inputs, self.mode)
        shapes = [tuple(node.meta["val"].shape) for node in exported.graph.output_node().all_input_nodes]
        outputs = tuple(replace(spec, shape=shape) for spec, shape in zip(signature.outputs, shapes, strict=True))
        return self.program.replace(
            METHOD,
            replace(
                traced,
                signature=replace(signature, outputs=outputs),
                exported=exported,
                weight_names={**traced.weight_names, **{entry: f"{METHOD}.{entry}" for entry in constants}},
            ),
            {f"{METHOD}.{entry}": value for entry, value in constants.items()},
        )
