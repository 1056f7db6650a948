"""Bounds on what a config.json may say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from graphs.config import ConfigReader
from graphs.errors import UserError
from graphs.files import contained, read_json, shown


def test_good_values_come_back_typed() -> None:
    reader = ConfigReader(
        {"width": 64, "eps": 1, "mean": [0, 0.5, 1], "tied": False, "act": "silu", "inner": {"depth": 3}, "none": None}
    )
    assert reader.int("width") == 64
    assert isinstance(reader.float("eps"), float)
    assert reader.floats("mean", length=3) == (0.0, 0.5, 1.0)
    assert reader.bool("tied") is False
    assert reader.choice("act", ["silu", "gelu"]) == "silu"
    assert reader.section("inner").int("depth") == 3
    assert reader.section("absent").int("depth", 7) == 7
    assert "width" in reader
    assert "none" not in reader


def test_absent_and_null_give_the_default_even_out_of_bounds() -> None:
    reader = ConfigReader({"none": None})
    assert reader.int("none", 0) == reader.int("absent", 0) == 0
    assert reader.float("none", 0.0) == 0.0
    assert reader.floats("none", (1.0, 2.0), length=2) == (1.0, 2.0)
    assert reader.bool("none", False) is False
    assert reader.choice("none", ["a"], "elsewhere") == "elsewhere"


@pytest.mark.parametrize("value", [-1, 0, 1 << 21, 10**400, 2.0, "64", True, [64], {}, math.nan])
def test_a_bad_dimension_names_key_and_bound(value: Any) -> None:
    with pytest.raises(UserError) as caught:
        ConfigReader({"hidden_size": value}).int("hidden_size")
    message = str(caught.value)
    assert message.startswith("config.json: hidden_size is ")
    assert message.endswith("it must be an integer from 1 to 1048576")
    assert len(message) < 200


def test_an_absent_dimension_names_key_and_bound() -> None:
    with pytest.raises(UserError, match=r"^vision: depth is absent; it must be an integer from 1 to 8$"):
        ConfigReader({}, "vision").int("depth", high=8)


@pytest.mark.parametrize("value", [0, -1e-5, math.inf, math.nan, "1e-5", True, 10**400])
def test_a_bad_number_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"rms_norm_eps is .*; it must be a number above 0, at most 1$"):
        ConfigReader({"rms_norm_eps": value}).float("rms_norm_eps", 1e-6, high=1.0)


@pytest.mark.parametrize("value", [[1, 2], [1, 2, "3"], [1, 2, math.nan], "123", 5])
def test_a_bad_list_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"image_mean is .* a list of 3 numbers"):
        ConfigReader({"image_mean": value}).floats("image_mean", length=3)


def test_a_bad_choice_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"config.json: hidden_act is 'silo'; did you mean 'silu'\?"):
        ConfigReader({"hidden_act": "silo"}).choice("hidden_act", ["silu", "gelu"])
    with pytest.raises(UserError, match="tied is 'yes'; it must be true or false"):
        ConfigReader({"tied": "yes"}).bool("tied")
    with pytest.raises(UserError, match="inner is 3; it must be a JSON object"):
        ConfigReader({"inner": 3}).section("inner")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "a JSON list, not an object"),
        ('{"a":' * 200_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": "' + "x" * 5000 + '"}', "more than the 4096"),
    ],
)
def test_bad_json_is_one_line(tmp_path: Path, text: str, cause: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=cause) as caught:
        read_json(path, max_bytes=4096 if "xxxx" in text else 1 << 24)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "a/b", "a\\b", "a\nb"])
def test_names_that_leave_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="points outside the directory") as caught:
        contained(tmp_path, name)
    assert "\n" not in str(caught.value)


def test_untrusted_words_are_shown_on_one_line() -> None:
    assert shown("a\nb\x1b[31m") == r"a\nb\x1b[31m"
    assert len(shown("x" * 1000)) == 123
