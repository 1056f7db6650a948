import pytest

from graphs.errors import UserError
from quant.scheme import Scheme, WeightScheme


@pytest.mark.parametrize(
    "text", ["w8", "w4g32", "w4g128z", "w3g64", "w8a8", "w8a8o", "w4g32a8t", "w8g32a8b", "f8", "f8af8", "p4", "p6a8"]
)
def test_text_form_round_trips(text: str) -> None:
    assert str(Scheme.parse(text)) == text


def test_parts() -> None:
    assert Scheme.parse("w4g32za8t") == Scheme(WeightScheme("int", 4, 32, asymmetric=True), "a8t")
    assert Scheme.parse("w8a8o").needs_ranges
    assert not Scheme.parse("w4g32a8b").needs_ranges


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("w5", "5 bits are not among w3, w4, w8"),
        ("w4g48", "groups are 16, 32, 64, 128, 256"),
        ("p4g32", "of integer weights only"),
        ("w8a8b", "needs a group"),
        ("w8af8", "float8 activations go with float8 weights"),
        ("f8a8", "float8 activations go with float8 weights"),
        ("int4", "is no scheme"),
        ("", "is no scheme"),
    ],
)
def test_refusals_name_the_choice(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "promised"),
    [
        ("w8", 64 * 128 + 64 * 4),
        ("w4g32", 64 * 128 // 2 + 64 * 4 * 4),
        ("w4g32z", 64 * 128 // 2 + 64 * 4 * 5),
        ("w4g32a8t", 64 * 128 // 2 + 64 * 4 * 2),  # bfloat16 scales
        ("w3", 64 * 128 * 3 // 8 + 64 * 4),
        ("p4", 64 * 128 // 2 + 16 * 4),
        ("f8af8", 64 * 128 + 64 * 4),
    ],
)
def test_bytes_are_those_of_codes_and_scales(text: str, promised: int) -> None:
    assert Scheme.parse(text).bytes((64, 128), 4) == promised
