"""The text form of passes: there and back, and what is refused in which words."""

from __future__ import annotations

import pytest

from export.listing import passes
from graphs.compress.base import apply, parse, write
from graphs.errors import UserError
from tests.tiny import tiny_program


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("pool{factor=2}", "pool{factor=2}"),
        (" pool { factor = 2 } ; ", "pool{factor=2}"),
        ("prune{keep=18}", "prune{keep=18,method=divprune,seed=0}"),
        (
            "pool{factor=2};prune{method=random,keep=3,seed=7}",
            "pool{factor=2};prune{keep=3,method=random,seed=7}",
        ),
    ],
)
def test_there_and_back(text: str, canonical: str) -> None:
    assert write(parse(text)) == canonical
    assert parse(canonical) == parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prone{keep=3}", "unknown pass 'prone': did you mean 'prune'"),
        ("prune{kep=3}", "prune has no option 'kep': did you mean 'keep'"),
        ("prune{keep=3,method=divprun}", "prune: method=divprun is unknown: did you mean 'divprune'"),
        ("prune{keep=many}", "prune: keep=many is not a whole number"),
        ("prune{keep=0}", "keep=0 is not positive"),
        ("pool{factor=-2}", "factor=-2 is not positive"),
        ("prune", "prune needs keep: write prune{keep=...}"),
        ("prune{keep=3,keep=4}", "must be keep=value, once"),
        ("prune{keep}", "must be keep=value, once"),
        ("prune{keep=3", "is not a pass: write name{option=value"),
        ("prune{keep=3}}", "is not a pass"),
        (";".join(["pool{factor=1}"] * 17), "17 passes are more than the 16"),
    ],
)
def test_refused_texts(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse(text)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prune{keep=10}", "keep=10 is more than the 9 tokens there are"),
        ("pool{factor=3};prune{keep=2}", "keep=2 is more than the 1 tokens there are"),
        ("pool{factor=2}", "factor=2 does not divide the grid of 3 x 3 tokens: choose from: 1, 3"),
        ("prune{keep=4};pool{factor=2}", "pool before prune"),
        ("prune{keep=4};prune{keep=4,method=cls_attention}", "over 4 tokens: use method=divprune"),
    ],
)
def test_what_does_not_fit_the_graph_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        apply(parse(text), tiny_program("tiny"))
    assert words in str(error.value)


def test_the_list_names_every_pass() -> None:
    assert set(passes()) == {"decoder_prune", "last_logits", "ldp", "pixel_shuffle", "pool", "prune", "thin"}
    assert all(about.startswith(name) for name, about in passes().items())
