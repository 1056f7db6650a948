"""Prompts read through methods that are written out here: what is fed under which name, and where positions stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from graphs.dialogue import Dialogue, kept
from graphs.errors import UserError
from graphs.preprocess.picture import Array, Picture, View
from graphs.program import Signature
from graphs.spec import Dim, TensorSpec

LENGTH = Dim("length", 1, 64)
IDS = TensorSpec("input_ids", (1, LENGTH), torch.int64)
EMBEDS = TensorSpec("inputs_embeds", (1, LENGTH, 2))
POSITION = TensorSpec("cache_position", (LENGTH,), torch.int64)
ROPE = TensorSpec("rope_position", (3, LENGTH), torch.int64)
LOGITS = TensorSpec("logits", (1, LENGTH, 2))
KEYS = TensorSpec("cross_keys", (1, 1, LENGTH, 2))
PIXELS = TensorSpec("pixel_values", (LENGTH, 2))


class Recording:
    """Pictures [n, 2] are their own embeddings; token t is [t, t]; what the decoder is given is kept."""

    def __init__(self, vision: Sequence[TensorSpec], decoder: Sequence[TensorSpec], encoder: bool = False) -> None:
        self.signatures: Mapping[str, Signature] = {
            "vision_encoder": Signature((PIXELS,), tuple(vision)),
            "token_embedding": Signature((IDS,), (EMBEDS,)),
            "text_decoder": Signature(tuple(decoder), (LOGITS,)),
            **({"text_encoder": Signature((EMBEDS,), (KEYS,))} if encoder else {}),
        }
        self.called: list[str] = []
        self.given: list[dict[str, Array]] = []

    def call(self, method: str, inputs: Sequence[Array]) -> list[Array]:
        self.called.append(method)
        if method == "token_embedding":
            return [np.repeat(inputs[0][..., None], 2, axis=-1).astype(np.float32)]
        if method == "text_decoder":
            specs = self.signatures[method].inputs
            self.given.append({spec.name: value for spec, value in zip(specs, inputs, strict=True)})
            return [inputs[0] * 10]
        if method == "text_encoder":
            return [inputs[0][None] + 100]
        outputs = {"image_embeds": inputs[0][None], "cross_keys": inputs[0][None, None]}
        return [outputs[spec.name] for spec in self.signatures[method].outputs]

    def reset(self) -> None:
        self.given = []


IMAGE = TensorSpec("image_embeds", (1, LENGTH, 2))
PICTURE = Picture((np.full((4, 2), 7, np.float32),), rope=np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]]))


def test_parts_of_a_picture_stand_where_the_prompt_reads_them_and_it_is_encoded_once() -> None:
    caller = Recording([IMAGE], [EMBEDS, POSITION])
    picture = Picture((np.arange(8, dtype=np.float32).reshape(4, 2),))
    dialogue = Dialogue(caller)
    read = dialogue.embed([[1], View(picture, 0, 2), [5, 6], View(picture, 2, 4)])
    assert read.embeds_1SD[0, :, 0].tolist() == [1, 0, 2, 5, 6, 4, 6]
    assert read.images_S.tolist() == [False, True, True, False, False, True, True]
    assert caller.called.count("vision_encoder") == 1
    assert dialogue.prefill(read).tolist() == [60, 70]
    assert dialogue.step(9).tolist() == [90, 90]
    assert [given["cache_position"].tolist() for given in caller.given] == [[0, 1, 2, 3, 4, 5, 6], [7]]


def test_positions_of_three_components_go_on_after_the_largest() -> None:
    caller = Recording([IMAGE], [EMBEDS, POSITION, ROPE])
    dialogue = Dialogue(caller)
    dialogue.prefill(dialogue.embed([[1, 2], View(PICTURE), [3]]))
    dialogue.step(4)
    assert caller.given[0]["rope_position"].tolist() == [
        [0, 1, 2, 2, 2, 2, 4],
        [0, 1, 2, 2, 3, 3, 4],
        [0, 1, 2, 3, 2, 3, 4],
    ]
    assert caller.given[1]["rope_position"].tolist() == [[5], [5], [5]]
    assert caller.given[1]["cache_position"].tolist() == [7]


def test_what_pictures_give_for_cross_attention_is_carried_along() -> None:
    caller = Recording([KEYS], [EMBEDS, POSITION, KEYS])
    dialogue = Dialogue(caller)
    other = Picture((np.full((3, 2), 8, np.float32),))
    read = dialogue.embed([View(PICTURE, token=42), View(other, token=42), [1]])
    assert read.embeds_1SD[0, :, 0].tolist() == [42, 42, 1]
    assert not read.images_S.any()
    dialogue.prefill(read)
    dialogue.step(3)
    for given in caller.given:
        assert given["cross_keys"][0, 0, :, 0].tolist() == [7, 7, 7, 7, 8, 8, 8]


@pytest.mark.parametrize(("most", "fit"), [(4, 1), (Dim("keys", 4, 11), 2)])
def test_more_pictures_than_cross_attention_takes_are_refused(most: int | Dim, fit: int) -> None:
    caller = Recording((KEYS,), (EMBEDS, TensorSpec("cross_keys", (1, 1, most, 2))))
    pictures = [np.full((4, 2), float(value), np.float32) for value in range(3)]
    assert Dialogue(caller).embed([[1], *pictures[:fit]]).carried["cross_keys"].shape[-2] == 4 * fit
    with pytest.raises(UserError, match=f"the prompt has 3 pictures; this model reads {fit} at the most"):
        Dialogue(caller).embed([[1], *pictures])


def test_an_encoder_reads_the_prompt_and_the_answer_begins_with_given_ids() -> None:
    caller = Recording([IMAGE], [EMBEDS, POSITION, KEYS], encoder=True)
    dialogue = Dialogue(caller, start=(2, 0))
    assert dialogue.prefill(dialogue.embed([View(PICTURE), [5]])).tolist() == [0, 0]
    dialogue.step(6)
    assert [given["inputs_embeds"][0, :, 0].tolist() for given in caller.given] == [[2, 0], [6]]
    assert [given["cache_position"].tolist() for given in caller.given] == [[0, 1], [2]]
    assert caller.given[1]["cross_keys"][0, 0, :, 0].tolist() == [107, 107, 107, 107, 105]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        Dialogue(Recording([IMAGE], [EMBEDS, POSITION])).embed([])


def test_embeddings_that_a_pass_left_stand_where_they_stood() -> None:
    assert kept(8, 8).tolist() == list(range(8))
    for places in range(3, 40):
        assert kept(places, -(-places // 2)).tolist() == list(range(0, places, 2))
    assert kept(8, 5).tolist() == [0, 2, 4, 6, 7]

    class Thinned(Recording):
        def call(self, method: str, inputs: Sequence[Array]) -> list[Array]:
            found = super().call(method, inputs)
            return [found[0][:, ::2]] if method == "vision_encoder" else found

    caller = Thinned([IMAGE], [EMBEDS, POSITION, ROPE])
    picture = Picture((np.arange(8, dtype=np.float32).reshape(4, 2),), rope=PICTURE.rope)
    dialogue = Dialogue(caller)
    read = dialogue.embed([[1], View(picture, 0, 1), [5], View(picture, 1, 4), [6]])
    assert read.embeds_1SD[0, :, 0].tolist() == [1, 0, 5, 4, 6]
    assert read.rope_3S[:, :3].tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    whole = dialogue.embed([[1], View(picture), [6]])
    assert whole.embeds_1SD[0, :, 0].tolist() == [1, 0, 4, 6]
    assert whole.rope_3S.tolist() == [[0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 1, 3]]  # the dropped columns still count
