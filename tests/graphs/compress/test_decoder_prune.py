"""decoder_prune against FastV with tokens really removed, through prefill, decoding and more prefill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphs.compress.base import apply, parse
from graphs.errors import UserError
from tests.graphs.compress import rules
from tests.graphs.compress.fastv import FastV
from tests.numbers import relative_l2
from tests.tiny import tiny_program

#: calls of a conversation: which tokens are of a picture ("i") and which are text
CALLS = ("ttttiiiiiiiiitttt", "t", "t", "ttiiiiitt", "t", "iii", "t")


@pytest.mark.parametrize(("variant", "layer", "keep"), [("tiny", 1, 3), (None, 2, 4), (None, 3, 1)])
def test_equals_fastv_with_tokens_removed(variant: str | None, layer: int, keep: int) -> None:
    model, program = rules.model_of(variant)
    text: Any = model.architecture.text  # type: ignore[attr-defined]
    pruned = apply(parse(f"decoder_prune{{layer={layer},keep={keep}}}"), program)
    assert pruned.methods["text_decoder"].signature.inputs[0].shape[-1] == text.hidden_size + 1
    decoder = pruned.module("text_decoder")
    names = program.methods["text_decoder"].weight_names
    weights = {f"text_decoder.{e}": program.tensor("text_decoder", e).double() for e in names}
    paper = FastV(
        weights,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.rope_theta,
        text.rms_norm_eps,
        layer,
        keep,
    )
    generator, start, dropped = torch.Generator().manual_seed(5), 0, 0
    for kinds in CALLS:
        image = torch.tensor([kind == "i" for kind in kinds])
        x = torch.randn(len(kinds), text.hidden_size, generator=generator)
        position = torch.arange(start, start + len(kinds))
        start += len(kinds)
        expected, stayed = paper.call(x.double(), image, position)
        (logits,) = decoder(torch.cat([x, image[:, None].float()], 1)[None], position)
        assert relative_l2(logits[stayed - position[0]], expected) < 1e-5
        dropped += len(kinds) - len(stayed)
    assert dropped == sum(max(0, kinds.count("i") - keep) for kinds in CALLS)
    lengths = [k.shape[1] for k, _ in paper.caches]
    assert lengths == [start] * layer + [start - dropped] * (text.num_hidden_layers - layer)


def decode(program: Any, embeds: Tensor) -> Tensor:
    return program.module("text_decoder")(embeds, torch.arange(embeds.shape[1]))


def test_text_alone_loses_nothing_and_pictures_do() -> None:
    program = tiny_program("tiny")
    pruned = apply(parse("decoder_prune{layer=1,keep=2}"), program)
    ids = torch.arange(3, 23)[None]
    embeds = program.module("token_embedding")(ids)
    marked = pruned.module("token_embedding")(ids)
    assert torch.equal(marked[..., :-1], embeds)
    assert not marked[..., -1].any()
    assert torch.equal(decode(pruned, marked), decode(program, embeds))
    pixels = next(program.methods["vision_encoder"].signature.method("v").examples(1))[0]
    picture, tagged = (p.module("vision_encoder")(pixels) for p in (program, pruned))
    assert torch.equal(tagged[..., :-1], picture)
    assert (tagged[..., -1] == 1).all()
    whole, some = (
        decode(program, torch.cat([embeds, picture, embeds], 1)),
        decode(pruned, torch.cat([marked, tagged, marked], 1)),
    )
    assert torch.equal(some[:, :20], whole[:, :20])
    assert relative_l2(some[:, -1], whole[:, -1]) > 1e-4


def test_keeping_all_changes_nothing_and_a_place_written_anew_is_judged_anew() -> None:
    program = tiny_program("tiny")
    everything = apply(parse("decoder_prune{layer=1,keep=9}"), program)
    x = torch.randn(1, 14, 64, generator=torch.Generator().manual_seed(0))
    images, none = torch.zeros(1, 14, 1), torch.zeros(1, 14, 1)
    images[:, 3:12] = 1
    assert torch.equal(decode(everything, torch.cat([x, images], 2)), decode(program, x))
    decoder = apply(parse("decoder_prune{layer=1,keep=1}"), program).module("text_decoder")
    position = torch.arange(14)
    assert not torch.equal(decoder(torch.cat([x, images], 2), position), decode(program, x))
    assert torch.equal(decoder(torch.cat([x, none], 2), position), decode(program, x))


@pytest.mark.parametrize(
    "text", ["pool{factor=3};decoder_prune{layer=1,keep=1}", "decoder_prune{layer=1,keep=1};pool{factor=3}"]
)
def test_goes_before_and_after_passes_over_the_encoder(text: str) -> None:
    program = apply(parse(text), tiny_program("tiny"))
    pooled = apply(parse("pool{factor=3}"), tiny_program("tiny"))
    pixels = next(program.methods["vision_encoder"].signature.method("v").examples(1))[0]
    out = program.module("vision_encoder")(pixels)
    assert out.shape == program.methods["vision_encoder"].signature.outputs[0].shape == (1, 1, 65)
    assert torch.equal(out[..., :-1], pooled.module("vision_encoder")(pixels))
    assert out[..., -1].item() == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("decoder_prune{layer=1,keep=10}", "decoder_prune: keep=10 is more than the 9 tokens there are"),
        (
            "decoder_prune{layer=5,keep=3}",
            "layer=5 leaves none of the 2 layers to prune; the nearest that does is layer=1",
        ),
        ("decoder_prune{layer=0,keep=3}", "decoder_prune: layer=0 is not positive, as in layer=2"),
        ("decoder_prune{layer=1,keep=3};decoder_prune{layer=1,keep=2}", "decoder_prune goes in once"),
        ("decoder_prune{keep=3}", "decoder_prune needs layer"),
    ],
)
def test_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        apply(parse(text), tiny_program("tiny"))
    assert words in str(error.value)


def test_a_model_without_pictures_has_no_place() -> None:
    program = tiny_program("tiny")
    methods = {name: program.methods[name] for name in ("token_embedding", "text_decoder")}
    with pytest.raises(UserError, match=r"nothing makes \[1, N, D\], only token_embedding, text_decoder"):
        apply(parse("decoder_prune{layer=1,keep=1}"), type(program)(methods, program.weights, program.constants))
