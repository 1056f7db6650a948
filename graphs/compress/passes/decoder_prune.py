"""Pruning of image tokens inside the decoder by the attention they receive (Chen et al., FastV, arXiv 2403.06764).

The first `layer` layers see every token. In the last of them, the attention that the last token of a prefill pays to
each image token, on average over heads, ranks them; all layers behind work with the `keep` best alone, at their
original positions, in this call and in every later one.

Here pruned tokens are masked out of those layers rather than taken out of the tensors. Dropped tokens influence
nothing, so all numbers of the tokens that stay are FastV's own. Its accuracy is what this pass shows, not its speed:
every layer's cache keeps the full length, and prefill computes what nobody reads. Removing them for good needs a
sequence whose length depends on whether a prompt has a picture, or a second decoder method over the same cache, which
ExecuTorch and Core ML do not share between methods. Logits at the positions of pruned tokens mean nothing.

Which tokens are of a picture is said by one more channel of the embeddings, behind the model's own: 1 for what
`vision_encoder` gives, 0 for `token_embedding`. Clients concatenate embeddings as before, so pictures may stand
anywhere, and prompts without any lose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphs.compress.base import Pass, closest
from graphs.compress.place import ATTENTION, value
from graphs.compress.rules.fastv import FastV
from graphs.dialogue import DECODER
from graphs.errors import UserError
from graphs.program import Program
from graphs.rewrite import Opened
from graphs.spec import TensorSpec

#: the child of the decoder's root module that holds the rule, and of the embedders' that holds the mark
RULE, MARK = "decoder_prune", "image_mark"


class Mark(nn.Module):
    """Embeddings [1, N, D] to [1, N, D + 1], the new channel all `mark`."""

    def __init__(self, mark: float) -> None:
        super().__init__()
        self.mark = mark

    def forward(self, x_1ND: Tensor) -> Tensor:
        return F.pad(x_1ND, (0, 1), value=self.mark)


@dataclass(frozen=True)
class DecoderPrune(Pass):
    """Behind the first `layer` layers, `keep` of a prefill's image tokens are seen."""

    name = "decoder_prune"
    about = "decoder_prune{layer,keep}: behind so many layers of the decoder, so many image tokens (FastV, as a mask)"

    layer: int
    keep: int

    def __post_init__(self) -> None:
        for option in ("layer", "keep"):
            if getattr(self, option) < 1:
                raise UserError(f"decoder_prune: {option}={getattr(self, option)} is not positive, as in {option}=2")

    def run(self, program: Program) -> Program:
        decoder = Opened.open(program, DECODER)
        tokens = visual_tokens(program)
        if self.keep > tokens:
            raise UserError(f"decoder_prune: keep={self.keep} is more than the {tokens} tokens there are")
        marked = mark(mark(program, "vision_encoder", 1.0), "token_embedding", 0.0)
        return self.prune(replace(decoder, program=marked))

    def prune(self, decoder: Opened) -> Program:
        """The program of an opened decoder, whose embedders mark what they make, with the rule inside."""
        graph = decoder.graph
        layers = attentions(graph)
        if self.layer >= len(layers):
            raise UserError(
                f"decoder_prune: layer={self.layer} leaves none of the {len(layers)} layers to prune; "
                f"the nearest that does is layer={closest(self.layer, range(1, len(layers)))}"
            )
        ranking = layers[self.layer - 1]
        query, key, _, mask = ranking.args[:4]
        assert isinstance(key, fx.Node)
        *_, context, width = value(key).shape  # type: ignore[union-attr]
        scale = ranking.kwargs.get("scale")
        scale = float(scale) if isinstance(scale, float) else float(width) ** -0.5
        rule = FastV(context, min(self.keep, context), scale)
        constants = decoder.attach(RULE, rule)
        state = TensorSpec(f"{RULE}.pruned", tuple(rule.pruned.shape))
        del constants[state.name]

        inputs = decoder.program.methods[DECODER].signature.inputs
        places = graph.find_nodes(op="placeholder")
        embeds, position = (next(i for i, s in enumerate(inputs) if s.values == v) for v in ("normal", "positions"))
        size = inputs[embeds].shape[-1]
        assert isinstance(size, int)
        with graph.inserting_after(places[-1]):
            marks = graph.call_function(torch.ops.aten.slice.Tensor, (places[embeds], 2, size, size + 1))
            plain = graph.call_function(torch.ops.aten.slice.Tensor, (places[embeds], 2, 0, size))
        places[embeds].replace_all_uses_with(plain, delete_user_cb=lambda user: user not in (marks, plain))
        with graph.inserting_before(ranking):
            hiding = graph.call_module(RULE, (marks, query, key, mask, places[position]))
        for node in layers[self.layer :]:
            node.update_arg(3, hiding)
        wider = replace(inputs[embeds], shape=(*inputs[embeds].shape[:-1], size + 1))
        return decoder.retrace(constants, (*inputs[:embeds], wider, *inputs[embeds + 1 :]), (state,))


def attentions(graph: fx.Graph) -> list[fx.Node]:
    """Each layer's attention, in order. Raises UserError where they share no mask [S, C], or are pruned already."""
    found = graph.find_nodes(op="call_function", target=ATTENTION)
    masks = {node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask") for node in found}
    mask = value(next(iter(masks))) if len(masks) == 1 else None
    if mask is None or mask.dim() != 2 or any(len(node.args) < 4 for node in found):
        raise UserError(
            "the graph has no place for this pass: looked for scaled_dot_product_attention under one mask [S, C] in "
            f"'{DECODER}', found {len(masks)} masks over {len(found)} layers; decoder_prune goes in once"
        )
    return found


def visual_tokens(program: Program) -> int:
    """Image embeddings [1, N, D] of a picture. Raises UserError where a program makes none."""
    encoder = program.methods.get("vision_encoder")
    shape = encoder.signature.outputs[0].shape if encoder else ()
    if len(shape) != 3 or not isinstance(shape[1], int):
        raise UserError(f"the model has no place for decoder_prune: nothing makes [1, N, D], only {', '.join(program)}")
    return shape[1]


def mark(program: Program, method: str, number: float) -> Program:
    """The program with one more channel, all `number`, in what `method` gives."""
    opened = Opened.open(program, method)
    given = opened.graph.output_node().all_input_nodes[0]
    constants = opened.attach(MARK, Mark(number))
    with opened.graph.inserting_after(given):
        marked = opened.graph.call_module(MARK, (given,))
    opened.graph.output_node().replace_input_with(given, marked)
    signature = program.methods[method].signature
    wider = tuple(replace(spec, shape=(*spec.shape[:-1], spec.shape[-1] + 1)) for spec in signature.outputs)  # type: ignore[operator]
    program = opened.retrace(constants)
    assert program.methods[method].signature.outputs == wider
    return program


PASS = DecoderPrune
