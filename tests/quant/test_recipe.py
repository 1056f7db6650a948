from pathlib import Path

import pytest

from graphs.errors import UserError
from quant.recipe import names, recipe

OWN = """
about = "mine"
floats = "float16"
kv_cache = ["int8", "float"]

[[layers]]
match = "text_decoder/*"
kind = "linear"
schemes = ["w4g64z", "float"]
scales = "gptq"
"""


def test_shipped_recipes_read_and_say_what_they_are() -> None:
    assert {"mobile-balanced", "mobile-small", "mobile-fast", "server-fp8", "server-int8", "reference-fp16"} <= set(
        names()
    )
    assert all(len(recipe(name).about) > 10 for name in names())


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    found = recipe(str(path))
    assert (found.name, found.floats, found.kv_cache) == ("mine", "float16", ("int8", "float"))
    assert found.layers[0].schemes == ("w4g64z", "float")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("float16", "float61", "did you mean 'float16'|float16"),
        ("gptq", "gptk", "gptq"),
        ("w4g64z", "w9", "is no scheme|bits are not among"),
        ("match", "mach", "needs match and schemes"),
        ('"linear"', '"linar"', "linear"),
        ('["int8", "float"]', '"int8"', "must be a list of strings"),
        ("about", "abuot", "about"),
        ('"mine"', "[", "no recipe can be read"),
    ],
)
def test_a_fault_in_it_is_named(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN.replace(old, new, 1))
    with pytest.raises(UserError, match=told) as caught:
        recipe(str(path))
    assert "mine.toml" in str(caught.value) or "scheme" in str(caught.value)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="reference-fp16"):
        recipe("reference-fp61")
    with pytest.raises(UserError, match="no recipe can be read"):
        recipe("missing.toml")
