"""What a bench measured beside what a plan says, of a real bundle's manifest and a row as bench gives it."""

from __future__ import annotations

import pytest

from export import planned
from export.cli import main
from export.pipeline import ExportOptions, export
from export.plan import plan
from export.stages import silent
from graphs.errors import UserError
from graphs.model import Request

DEVICE = "epyc-zen4-2-cores"


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("planned") / "b"
    export(ExportOptions(Request("mobilevlm", "tiny"), "onnxruntime", "reference-fp32", out=out), silent)
    return {
        "bundle": str(out),
        "prompt_tokens": 20,
        "vision_ms": 3.0,
        "prefill_tokens_per_s": 1000.0,
        "decode_tokens_per_s": 500.0,
    }


def test_measured_planned_and_their_ratio(row: dict[str, object]) -> None:
    found = planned.compare(row, DEVICE)
    assert {name: values["measured_ms"] for name, values in found.items()} == {
        "vision": 3.0,
        "prefill": 20.0,
        "decode": 2.0,
    }
    visual = plan(Request("mobilevlm", "tiny"), 1, "reference-fp32")["visual_tokens"]
    whole = plan(Request("mobilevlm", "tiny"), 20 - visual, "reference-fp32")["devices"][DEVICE]["milliseconds"]
    assert found["vision"]["bound_ms"] == pytest.approx(whole["vision_encoder"])
    assert found["prefill"]["bound_ms"] == pytest.approx(whole["text_decoder (prefill 20)"])
    assert found["decode"]["bound_ms"] == pytest.approx(whole["text_decoder (one token)"])
    for values in found.values():
        assert values["over_bound"] == values["measured_ms"] / values["bound_ms"]
        assert values["over_bound"] >= values["over_expected"] > 0
    told = planned.table([{**row, "planned": found}], DEVICE)
    assert told.startswith(f"planned on {DEVICE}")
    assert [line.split()[1] for line in told.splitlines()[2:]] == ["vision", "prefill", "decode"]


def test_no_decoding_has_no_ratio(row: dict[str, object]) -> None:
    found = planned.compare({**row, "decode_tokens_per_s": None}, DEVICE)
    assert found["decode"]["measured_ms"] is found["decode"]["over_bound"] is None
    assert " - " in planned.table([{**row, "planned": found}], DEVICE)


def test_other_devices_have_no_expectation_and_unknown_ones_are_refused(row: dict[str, object]) -> None:
    assert planned.compare(row, "macbook-air-m2")["vision"]["expected_ms"] is None
    with pytest.raises(UserError, match="unknown device"):
        planned.compare(row, "epyc")


def test_an_unknown_device_is_refused_before_anything_is_measured(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "no-such-bundle", "--device", "epyc-zen4"]) == 2
    assert "unknown device 'epyc-zen4'" in capfd.readouterr().err
