"""JSON for people."""

from __future__ import annotations

import json

import pytest

from graphs.files import readable

VALUE = {
    "a": 1,
    "long": {"x" * 50: [1.5, None, True], "y" * 50: ["é" * 30, {}, []]},
    "rows": [[1, 2]] * 30,
    "none": None,
}


def test_it_reads_back_with_short_entries_on_one_line() -> None:
    text = readable(VALUE)
    assert json.loads(text) == VALUE
    assert '\n "a": 1,\n' in text
    assert text.count("[1, 2]") == 30
    assert readable({"tokens": {"before": 36}}) == '{"tokens": {"before": 36}}'
    assert readable([[1, 2], [3, 4]], width=8) == "[\n [1, 2],\n [3, 4]\n]"


def test_numbers_that_json_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"(?i)not json compliant"):
        readable({"a": [1.0, float("nan")]})
