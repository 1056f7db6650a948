"""Rooflines: sums over kinds of operators, each at the peak of its own number format."""

from __future__ import annotations

from dataclasses import replace

import pytest

from export.roofline import FLOATS, Device, Numbers, Part, device, devices, parts
from export.targets.base import TARGETS
from export.work import Call, Weight
from graphs.errors import UserError
from graphs.spec import TensorSpec
from quant.layers import Weighed
from quant.recipe import recipe

PLAIN = Device("a device", "onnxruntime", 8, 100, {"fp32": 1, "int8": 4}, "nowhere")


def layer(entry: str, *shape: int) -> Weighed:
    return Weighed("text_decoder", entry, "linear", shape)


def test_kinds_add_up_each_bound_by_what_it_lacks() -> None:
    found = [Part("linear", "int8", 8 * 10**9, 10**8), Part("attention", "fp32", 10**9, 2 * 10**9)]
    assert PLAIN.bound(found) == pytest.approx(0.002 + 0.02)  # operations of the first, bytes of the second
    assert PLAIN.expected(found) is None
    slower = replace(PLAIN, efficiency={"int8": 0.5, "fp32": 1.0, "bandwidth": 0.8})
    assert slower.bound(found) == PLAIN.bound(found)
    assert slower.expected(found) == pytest.approx(0.004 + 0.025)
    assert replace(slower, efficiency={"int8": 0.5, "bandwidth": 0.8}).expected(found) is None


def test_layers_compute_in_what_their_activations_are() -> None:
    weights = (
        Weight(1, 64 * 64, layer("layers.0.up.weight", 64, 64), 100),
        Weight(2, 64 * 64, layer("layers.1.up.weight", 64, 64), 10),
        Weight(3, 64, None, 0),
    )
    call = Call("text_decoder", weights, 7, (TensorSpec("cache.k", (1, 2, 16, 8)),))
    rows = {"text_decoder/layers.0.up.weight": "w4g32a8b", "text_decoder/layers.1.up.weight": "w4g32"}
    manifest = {
        "quantization": {
            "floats": "float32",
            "kv_cache": "int8",
            "layers": {name: {"scheme": scheme} for name, scheme in rows.items()},
        }
    }
    packed = 64 * 64 // 2 + 4 * 64 * 64 // 32
    assert parts(call, Numbers.of_bundle(manifest)) == [
        Part("linear", "int8", 100, packed),
        Part("linear", "fp32", 10, packed),
        Part("other", "fp32", 0, 64 * 4),
        Part("attention", "fp32", 7, 2 * 16 * 8 + 2 * 16 * 4),
    ]


def test_a_target_that_lacks_a_recipes_floats_has_its_own() -> None:
    assert Numbers.on_target(recipe("reference-fp16"), "executorch").floats == "float32"
    assert Numbers.on_target(recipe("reference-bf16"), "tensorrt").floats == "bfloat16"
    with pytest.raises(UserError, match="tensorrt keeps no int8 KV cache"):
        Numbers.on_target(replace(recipe("reference-fp16"), kv_cache=("int8",)), "tensorrt")


def test_numbers_that_a_device_lacks_are_refused() -> None:
    with pytest.raises(UserError, match="does not compute in fp8"):
        PLAIN.bound([Part("linear", "fp8", 1, 1)])
    with pytest.raises(UserError, match=r"unknown device .iphone-15.: .*iphone-15-pro"):
        device("iphone-15")


def test_the_data_file_says_where_every_figure_is_from() -> None:
    names = set(devices())
    assert {"iphone-15-pro", "snapdragon-8-gen-3", "jetson-agx-orin-64", "macbook-air-m2", "laptop-rtx-4060"} < names
    assert {"nvidia-h100-sxm", "nvidia-h200-sxm", "epyc-zen4-2-cores"} < names
    for found in devices().values():
        assert found.target in TARGETS
        assert found.source
        assert set(found.compute) <= {*FLOATS.values(), "int8", "fp8"}
        assert found.compute["fp32"] <= found.compute["fp16"] <= found.compute["int8"]
        assert set(found.efficiency) <= {*found.compute, "bandwidth"}
        assert all(0 < share <= 1 for share in found.efficiency.values())
        assert bool(found.efficiency) == bool(found.measured)
