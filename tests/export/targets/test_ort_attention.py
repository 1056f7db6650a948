"""Attention over a cache as one operator: found by its pattern, with the graph's numbers however a prompt is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.helper import get_attribute_value
from torch import Tensor, nn

from export.gate import Limit
from export.targets.base import LIMITS, LowerOptions
from export.targets.onnxruntime import TARGET
from export.verify import program_signatures, relative_l2
from graphs.components.text.cache import MASKED, KVCache, caches, causal_mask
from graphs.components.text.config import TextConfig
from graphs.components.text.decoder import TextDecoder
from graphs.program import Program, Signature
from graphs.spec import Dim, TensorSpec
from quant.kv_cache import Int8Cache
from quant.precision import CastFloats
from runtimes.base import Array, Artifact, load_runtime
from runtimes.eager import EagerRuntime
from tests.tiny import toy_program

CONTEXT, LENGTHS = 48, (9, 7, 1, 1, 20, 1)
#: two layers, four heads of 16, two key-value heads
PLAIN = TextConfig(64, 96, 2, 4, 2, 40)
#: what a decoder has -> the attributes of its layers' operators, beside the counts of heads
CASES: dict[str, tuple[TextConfig, list[dict[str, Any]]]] = {
    "grouped": (PLAIN, [{"do_rotary": 1, "scale": 0.25}] * 2),
    "alike": (replace(PLAIN, num_key_value_heads=4), [{"do_rotary": 1, "scale": 0.25}] * 2),
    "window": (
        replace(PLAIN, sliding_window=5),
        [{"do_rotary": 1, "scale": 0.25, "local_window_size": 5}] * 2,
    ),
    "window of one": (
        replace(PLAIN, sliding_window=1),
        [{"do_rotary": 1, "scale": 0.25, "local_window_size": 1}] * 2,
    ),
    "capped, a window in one layer": (
        replace(PLAIN, attention_softcap=2.0, sliding_window=6, full_layers=(1,), attention_scale=0.5, sandwich=True),
        [
            {"do_rotary": 1, "scale": 0.5, "softcap": 2.0, "local_window_size": 6},
            {"do_rotary": 1, "scale": 0.5, "softcap": 2.0},
        ],
    ),
    "normed": (replace(PLAIN, qk_norm=True), [{"do_rotary": 1, "scale": 0.25}] * 2),
    "narrow": (replace(PLAIN, head_dim=24), [{"scale": 24**-0.5}] * 2),
    "odd": (replace(PLAIN, head_dim=12), []),
    "turned in part": (replace(PLAIN, rotary_fraction=0.5), [{"scale": 0.25}] * 2),
    "three positions": (replace(PLAIN, mrope_section=(2, 3, 3)), [{"scale": 0.25}] * 2),
    "prefix, capped": (
        replace(PLAIN, prefix=True, attention_softcap=2.0),
        [{"do_rotary": 1, "scale": 0.25, "causal": 0, "softcap": 2.0}] * 2,
    ),
    "prefix": (replace(PLAIN, prefix=True), [{"do_rotary": 1, "scale": 0.25, "causal": 0}] * 2),
}


@cache
def decoder(case: str) -> Program:
    config = CASES[case][0]
    sequence = Dim("sequence", 1, CONTEXT)
    inputs = [
        TensorSpec("inputs_embeds", (1, sequence, config.hidden_size)),
        TensorSpec("cache_position", (sequence,), torch.int64, "positions"),
    ]
    if config.mrope_section:
        inputs.append(TensorSpec("rope_position", (3, sequence), torch.int64, "positions"))
    made = TextDecoder(config, CONTEXT)
    outputs = (TensorSpec("logits", (1, sequence, config.vocab_size)),)
    return toy_program("decoder", lambda: TextDecoder(config, CONTEXT), Signature(tuple(inputs), outputs, caches(made)))


def lowered(program: Program, directory: Path, floats: str = "float32") -> Artifact:
    options = LowerOptions(floats, {"decoder": Limit(LIMITS[floats])}, loads=True)
    made = TARGET.lower(TARGET.legalize(program), directory, options)
    return Artifact(directory, program_signatures(program), made.files, made.details)


def calls(program: Program, lengths: tuple[int, ...]) -> list[list[Array]]:
    """The same tokens in every cut: inputs of one call each."""
    specs = program.methods["decoder"].signature.inputs
    whole = np.random.default_rng(0).standard_normal((1, CONTEXT, PLAIN.hidden_size)).astype(np.float32)
    floats = np.float16 if specs[0].dtype == torch.float16 else np.float32
    made, start = [], 0
    for length in lengths:
        position = np.arange(start, start + length)
        rope = np.stack([position, position // 2, position % 3])
        made.append([whole[:, start : start + length].astype(floats), position, rope][: len(specs)])
        start += length
    return made


def run(runtime: Any, inputs: list[list[Array]]) -> Array:
    runtime.reset()
    return np.concatenate([runtime.call("decoder", call)[0] for call in inputs], 1)


def biased(position_S: Tensor) -> Tensor:
    """A bias that differs by head, as T5 has it, beside the causal mask."""
    distance_SC = (position_S.unsqueeze(1) - torch.arange(CONTEXT)).abs().float()
    slopes_411 = torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(4, 1, 1)
    return (slopes_411 * -distance_SC + causal_mask(position_S, CONTEXT, torch.float32)).unsqueeze(0)


def limited(position_S: Tensor) -> Tensor:
    """Every third key is hidden besides."""
    shown_C = torch.arange(CONTEXT) % 3 < 2
    return torch.minimum(causal_mask(position_S, CONTEXT, torch.float32), torch.where(shown_C, 0.0, MASKED))


def ahead(position_S: Tensor) -> Tensor:
    """Keys up to two behind the query's own position are seen, written or not."""
    return causal_mask(position_S + 2, CONTEXT, torch.float32)


def first_alone(position_S: Tensor) -> Tensor:
    """Every key of the cache is seen, but the first."""
    return torch.where(torch.arange(CONTEXT) > 0, 0.0, MASKED).expand(position_S.shape[0], -1)


def narrow(position_S: Tensor) -> Tensor:
    """Behind the query's own position nothing, before it nothing outside of both windows."""
    return torch.minimum(
        causal_mask(position_S, CONTEXT, torch.float32, window=7), causal_mask(position_S, CONTEXT, torch.float32)
    )


class Masked(nn.Module):
    """Attention over a cache with a mask of its own."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mask, self.cache, self.proj = mask, KVCache(4, CONTEXT, 16), nn.Linear(64, 192)

    def forward(self, x_1SD: Tensor, position_S: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.proj(x_1SD).chunk(3, -1))
        k, v = self.cache(k, v, position_S)
        made = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(position_S))
        return made.transpose(1, 2).flatten(2)


#: a mask -> the operator's `causal` and whether it is given the mask; None where it is not put
MASKS: dict[Callable[[Tensor], Tensor], tuple[int, bool] | None] = {
    biased: (1, True),
    limited: (1, True),
    narrow: (1, True),
    ahead: None,
    first_alone: None,
}


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.__name__)
def test_masks(mask: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    sequence = Dim("sequence", 1, CONTEXT)
    x, y = (TensorSpec(name, (1, sequence, 64)) for name in "xy")
    inputs = (x, TensorSpec("cache_position", (sequence,), torch.int64, "positions"))
    program = toy_program("decoder", lambda: Masked(mask), Signature(inputs, (y,), caches(Masked(mask))))
    artifact = lowered(program, tmp_path)
    nodes = onnx.load(tmp_path / "decoder.onnx").graph.node
    found = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    given = [{a.name: get_attribute_value(a) for a in node.attribute} for node in found]
    forms = [(a.get("causal", 1), len(node.input) == 11) for a, node in zip(given, found, strict=True)]
    assert forms == ([] if MASKS[mask] is None else [MASKS[mask]])
    calls_ = calls(program, LENGTHS)
    expected = run(EagerRuntime(program), calls_)
    assert relative_l2([run(load_runtime("onnxruntime", artifact), calls_)], [expected]) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_found_and_exact(case: str, tmp_path: Path) -> None:
    program = decoder(case)
    artifact = lowered(program, tmp_path)
    nodes = onnx.load(tmp_path / "decoder.onnx").graph.node
    found = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    attributes = [{a.name: get_attribute_value(a) for a in node.attribute} for node in found]
    heads = {"num_heads": 4, "kv_num_heads": CASES[case][0].num_key_value_heads}
    assert attributes == [pytest.approx({**heads, **wanted}) for wanted in CASES[case][1]]
    assert (
        ("Softmax" in {node.op_type for node in nodes})
        == ("ScatterND" in {node.op_type for node in nodes})
        == (not found)
    )
    details = artifact.details["methods"]["decoder"]
    assert details["optimized_operators"].get("GroupQueryAttention", 0) == len(found)
    assert len(details["in_place"]) == 4

    inputs = calls(program, LENGTHS)
    expected = run(EagerRuntime(program), inputs)
    runtime = load_runtime("onnxruntime", artifact)
    actual = run(runtime, inputs)
    assert relative_l2([actual], [expected]) < 1e-6
    if not case.startswith("prefix"):  # what is read in one call depends on the cut there
        assert relative_l2([run(runtime, calls(program, (sum(LENGTHS),)))], [expected]) < 1e-6
    apart = {**artifact.details, "methods": {"decoder": {**details, "in_place": []}}}
    other = load_runtime("onnxruntime", replace(artifact, details=apart))
    assert np.array_equal(run(other, inputs), actual)


def test_float16(tmp_path: Path) -> None:
    program = CastFloats(torch.float16).run(decoder("window"))
    artifact = lowered(program, tmp_path, "float16")
    assert artifact.details["methods"]["decoder"]["optimized_operators"]["GroupQueryAttention"] == 2
    inputs = calls(program, LENGTHS)
    actual = run(load_runtime("onnxruntime", artifact), inputs)
    assert relative_l2([actual], [run(EagerRuntime(program), inputs)]) < LIMITS["float16"]


def test_integer_caches_stay(tmp_path: Path) -> None:
    program = Int8Cache().run(decoder("grouped"))
    artifact = lowered(program, tmp_path)
    details = artifact.details["methods"]["decoder"]
    assert details["operators"]["ScatterND"] == len(details["in_place"]) == 8
    inputs = calls(program, LENGTHS)
    assert (
        relative_l2([run(load_runtime("onnxruntime", artifact), inputs)], [run(EagerRuntime(program), inputs)]) < 1e-2
    )
