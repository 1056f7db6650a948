"""The .pte file: the graph's numbers, the layout that the stock runner reads, heavy operators inside the delegate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.nn import functional as F

from export.gate import Limit
from export.layouts.executorch import constant_methods
from export.targets import executorch
from export.targets.base import LIMITS, Lowered, LowerOptions
from export.targets.executorch import FILE, TARGET
from export.targets.executorch_graph import legalize
from export.verify import compare, program_signatures, record, seeded_inputs
from graphs.errors import GateError, UserError
from graphs.program import Program, Signature, TracedMethod
from graphs.spec import TensorSpec
from graphs.trace import trace_module
from runtimes.base import Artifact, load_runtime
from runtimes.eager import EagerRuntime
from tests.tiny import tiny_program

METADATA = {"context": 64, "bos_id": None, "eos_ids": [2, 5], "vocab_size": 256, "visual_tokens": 9, "layers": 2}


def only(program: Program, *methods: str) -> Program:
    return replace(program, methods={name: program.methods[name] for name in methods})


def lower(program: Program, directory: Path) -> Lowered:
    return TARGET.lower(
        TARGET.legalize(program),
        directory,
        LowerOptions("float32", dict.fromkeys(program, Limit(1e-4)), metadata=METADATA),
    )


def errors(program: Program, lowered: Lowered, directory: Path) -> dict[str, float]:
    """Relative L2 of every method, a prefill and three steps where it keeps state."""
    artifact = Artifact(directory, program_signatures(program), lowered.files, lowered.details)
    inputs = seeded_inputs(program_signatures(program), seed=1)
    actual = record(load_runtime("executorch", artifact), inputs)
    found = compare(actual, record(EagerRuntime(program), inputs))
    return {method: error["relative_l2"] for method, error in found.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lowered]:
    directory = tmp_path_factory.mktemp("tiny")
    return directory, lower(tiny_program("tiny"), directory)


def test_numbers(made: tuple[Path, Lowered]) -> None:
    found = errors(tiny_program("tiny"), made[1], made[0])
    assert set(found) == {"vision_encoder", "token_embedding", "text_decoder"}
    assert all(error <= LIMITS["float32"] / 10 for error in found.values()), found


def test_numbers_of_the_second_projector(tmp_path: Path) -> None:
    program = only(tiny_program("tiny-v2"), "vision_encoder")
    lowered = lower(program, tmp_path)
    assert errors(program, lowered, tmp_path)["vision_encoder"] <= LIMITS["float32"] / 10
    assert "aten::avg_pool2d" not in lowered.details["methods"]["vision_encoder"]["portable_operators"]


def test_the_stock_layout(made: tuple[Path, Lowered]) -> None:
    program = Runtime.get().load_program(made[0] / FILE)
    constants = {
        "get_max_seq_len": [64],
        "get_max_context_len": [64],
        "get_eos_ids": [2, 5],
        "get_vocab_size": [256],
        "get_n_layers": [2],
        "get_visual_tokens": [9],
        "enable_dynamic_shape": [True],
        "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [False],
        "modality": ["vision"],
    }
    assert program.method_names == {"vision_encoder", "token_embedding", "text_decoder", *constants}
    for name, value in constants.items():
        method = program.load_method(name)
        assert method is not None
        assert method.execute([]) == value
    shapes = {
        name: [program.metadata(name).input_tensor_meta(i).sizes() for i in range(program.metadata(name).num_inputs())]
        for name in ("vision_encoder", "token_embedding", "text_decoder")
    }
    # A cache_position of more than one element tells the runner to fill in every position.
    assert shapes == {
        "vision_encoder": [(1, 3, 48, 48)],
        "token_embedding": [(1, 64)],
        "text_decoder": [(1, 64, 64), (64,)],
    }
    byte, long = 0, 4  # numbers of ExecuTorch's ScalarType
    assert program.metadata("vision_encoder").input_tensor_meta(0).dtype() == byte
    assert program.metadata("text_decoder").input_tensor_meta(1).dtype() == long


def test_what_is_unknown_is_left_out() -> None:
    assert constant_methods(["image_encoder"], {"eos_ids": [], "bos_id": None, "image_size": 48}) == {
        "get_image_size": 48
    }
    assert constant_methods(["text_decoder"], {"bos_id": 1})["get_bos_id"] == 1
    assert "modality" not in constant_methods(["text_decoder"], {})
    assert constant_methods(["text_decoder", "vision_encoder"], {})["modality"] == "vision"


def test_what_runs_where(made: tuple[Path, Lowered]) -> None:
    """Two delegates a layer and one more; caches written in place; no guard of attention outside."""
    decoder = made[1].details["methods"]["text_decoder"]
    assert decoder["delegates"] == 5
    assert decoder["portable_operators"]["aten::index_put_"] == 4
    outside = set(decoder["portable_operators"])
    assert not outside & {"aten::index_put", "aten::copy_", "aten::any", "aten::mean", "aten::bmm", "aten::linear"}
    tower = made[1].details["methods"]["vision_encoder"]["portable_operators"]
    assert not set(tower) & {"aten::convolution", "aten::linear", "aten::bmm", "aten::_softmax", "aten::any"}


def test_legalizing_computes_the_same_and_leaves_its_input_alone() -> None:
    program = tiny_program("tiny")
    legal = legalize(program)
    legal.check()
    program.check()
    inputs = seeded_inputs(program_signatures(program), seed=2)
    found = compare(record(EagerRuntime(legal), inputs), record(EagerRuntime(program), inputs))
    assert all(error["relative_l2"] < 1e-6 for error in found.values()), found
    targets = {str(node.target) for node in legal.methods["text_decoder"].exported.graph.nodes}
    assert not targets & {"aten.scaled_dot_product_attention.default", "aten.rms_norm.default"}


class Forms(nn.Module):
    """Attention and norms in the forms that the rewriting must leave alone, or must take with other arguments."""

    def forward(self, x: Tensor, q: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        seen = torch.ones(5, 5, dtype=torch.bool).tril()
        return (
            F.scaled_dot_product_attention(q, q, q, attn_mask=seen),
            F.scaled_dot_product_attention(q, q, q, is_causal=True),
            F.scaled_dot_product_attention(q, q, q, scale=0.3),
            F.rms_norm(x, (4, 6), eps=1e-3),
            F.rms_norm(x, (6,), eps=1e-3),
            F.avg_pool2d(pixels, 2),
            F.avg_pool2d(pixels, 3, stride=2, padding=1),
        )


def test_other_forms_of_the_same_operators() -> None:
    specs = (TensorSpec("x", (3, 4, 6)), TensorSpec("q", (1, 2, 5, 8)), TensorSpec("pixels", (1, 2, 8, 8)))
    from torch._subclasses.fake_tensor import FakeTensorMode

    exported = trace_module(Forms(), specs, FakeTensorMode(allow_non_fake_inputs=True))
    signature = Signature(specs, tuple(TensorSpec(f"y{i}", ()) for i in range(7)))
    program = Program({"forms": TracedMethod(signature, exported, {})}, {}, {})
    legal = legalize(program)
    calls = [str(node.target) for node in legal.methods["forms"].exported.graph.nodes]
    assert calls.count("aten.scaled_dot_product_attention.default") == 2
    assert calls.count("aten.rms_norm.default") == 1
    inputs: dict[str, Any] = seeded_inputs(program_signatures(program))
    found = compare(record(EagerRuntime(legal), inputs), record(EagerRuntime(program), inputs))
    assert found["forms"]["relative_l2"] < 1e-6


def test_an_unknown_delegate_is_refused(tmp_path: Path) -> None:
    options = LowerOptions("float32", {}, extra={"delegate": "vulkan"})
    with pytest.raises(UserError, match=r"unknown delegate 'vulkan' of executorch: choose from: xnnpack"):
        TARGET.lower(tiny_program("tiny"), tmp_path, options)
    assert list(tmp_path.iterdir()) == []


def test_what_executorch_raises_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(*args: object) -> None:
        try:
            raise RuntimeError("size of tensor a (128)\nin a graph")
        except RuntimeError as error:
            raise Exception("An error occurred when running some pass") from error

    monkeypatch.setattr(executorch, "write", failing)
    with pytest.raises(GateError, match=r"^ExecuTorch cannot lower vision_encoder, .*: size of tensor a \(128\)$"):
        lower(tiny_program("tiny"), tmp_path)
