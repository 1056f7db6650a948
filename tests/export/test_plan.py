"""Plans: seconds, little memory, figures that follow from the dimensions."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from export.plan import describe, plan
from export.roofline import devices
from graphs.model import Request
from graphs.registry import variant
from graphs.trace import count_parameters

PLAN = """
import resource, sys
from export.cli import main
status = main(sys.argv[1:])
sys.stderr.write(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}")
sys.exit(status)
"""


def test_seven_billion_parameters_in_less_than_two_gigabytes() -> None:
    arguments = ["plan", "mobilevlm", "--variant", "mobilevlm-v2-7b", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", PLAN, *arguments], capture_output=True, text=True, timeout=300, check=True
    )
    result = json.loads(done.stdout)
    assert result["parameters"] == count_parameters(variant("mobilevlm", "mobilevlm-v2-7b").architecture)
    assert result["visual_tokens"] == 144
    assert result["kv_cache_bytes"] == 2 * 32 * 32 * 2048 * 128 * 2
    peak = int(done.stderr.rsplit("peak ", 1)[1])
    assert peak < 2 * 2**20


def test_operations_are_those_of_the_matrices() -> None:
    result = plan(Request("mobilevlm", "mobilevlm-1.7b"), prompt_tokens=16, recipe_name=None)
    decode = result["methods"]["text_decoder (one token)"]["flops"]
    layer = 4 * 2048 * 2048 + 3 * 2048 * 5632
    attention = 2 * 16 * 128 * (144 + 16 + 1)  # a picture, the text and the new token, not the whole cache
    assert decode == 2 * (24 * (layer + attention) + 2048 * 32000)
    assert result["methods"]["text_decoder (one token)"]["operations"]["attention fp16"] == 2 * 24 * attention
    assert result["methods"]["text_decoder (one token)"]["state_bytes"] == 24 * 2 * 2048 * 161 * 2
    # 350 GOP is the field's figure for 23 blocks of CLIP ViT-L/14 at 336 pixels
    assert result["methods"]["vision_encoder"]["flops"] / 1e9 == pytest.approx(365, rel=0.05)


def test_half_precision_halves_the_bytes() -> None:
    whole = plan(Request("mobilevlm", "tiny"), 16, "reference-fp32")
    half = plan(Request("mobilevlm", "tiny"), 16, "reference-fp16")
    assert whole["weight_bytes"] == 2 * half["weight_bytes"] == 4 * whole["deployed_parameters"]


def test_recipes_are_counted_in_their_own_bits() -> None:
    request = Request("mobilevlm", "mobilevlm-1.7b")
    whole, small = (plan(request, 16, recipe) for recipe in ("reference-fp16", "mobile-balanced"))
    numbers = 24 * (4 * 2048 * 2048 + 3 * 2048 * 5632)  # four bits, and half precision for every 32
    table = 32000 * 2048  # eight bits: the embedding a scale a row, the head one for every 32
    decoder = numbers / 2 + numbers / 16 + (table + table / 16)
    found = small["methods"]["text_decoder (one token)"]["weight_bytes"]
    assert found == pytest.approx(decoder, rel=1e-3)  # norms are in half precision
    assert small["weight_bytes"] < 0.4 * whole["weight_bytes"]
    assert small["deployed_parameters"] == whole["deployed_parameters"]


def test_pictures_of_any_size_are_counted_at_the_largest() -> None:
    result = plan(Request("qwen2_vl", "tiny"), 16, None)
    shown = [name for name in result["methods"] if name.startswith("vision_encoder")]
    assert shown == ["vision_encoder (largest picture)"]
    assert f"text_decoder (prefill {min(result['visual_tokens'] + 16, result['context'])})" in result["methods"]


def test_an_encoder_reads_the_prompt_and_a_decoder_a_token_at_a_time() -> None:
    methods = plan(Request("florence2", "tiny"), 16, None)["methods"]
    assert {"text_encoder", "text_decoder (one token)"} <= set(methods)
    assert not any("prefill" in name for name in methods)


def test_devices_compute_in_the_numbers_that_their_target_gives() -> None:
    result = plan(Request("mobilevlm", "mobilevlm-1.7b"), 16, "server-int8")
    epyc, iphone = (result["devices"][name] for name in ("epyc-zen4-2-cores", "iphone-15-pro"))
    assert (epyc["floats"], iphone["floats"]) == ("float32", "float16")
    linear = 24 * 2 * (4 * 2048 * 2048 + 3 * 2048 * 5632) * 160
    prefill = epyc["milliseconds"]["text_decoder (prefill 160)"]
    attention = 2 * 2 * 24 * 2048 * 160 * 161
    head = 2 * 2048 * 32000 * 160
    assert prefill == pytest.approx(1e3 * ((linear + head) / 0.66e12 + attention / 0.162e12), rel=1e-3)
    floats = plan(Request("mobilevlm", "mobilevlm-1.7b"), 16, "reference-fp32")["devices"]["epyc-zen4-2-cores"]
    assert floats["milliseconds"]["text_decoder (prefill 160)"] > 3 * prefill


def test_what_a_device_cannot_do_is_refused_by_name() -> None:
    rows = plan(Request("mobilevlm", "tiny"), 16, "server-fp8")["devices"]
    assert rows["nvidia-h100-sxm"]["milliseconds"]["vision_encoder"] > 0
    assert rows["jetson-agx-orin-64"]["refused"].startswith("does not compute in fp8")
    assert "no kernels for f8af8" in rows["iphone-15-pro"]["refused"]
    assert not rows["jetson-agx-orin-64"]["fits"]
    told = describe(plan(Request("mobilevlm", "tiny"), 16, "server-fp8"))
    assert "does not compute in fp8" in told


def test_expectations_stand_beside_bounds_where_they_were_measured() -> None:
    for name, row in plan(Request("mobilevlm", "tiny"), 16, "mobile-fast")["devices"].items():
        expected = row["expected_milliseconds"]
        assert set(expected) == (set(row["milliseconds"]) if devices()[name].efficiency else set())
        assert all(expected[call] >= row["milliseconds"][call] for call in expected)
    assert devices()["epyc-zen4-2-cores"].efficiency
