"""Engines built here, without a GPU: what they are made from is evaluated, what the builder refuses is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.gate import Limit
from export.targets.base import Lowered, LowerOptions
from export.targets.onnx_graph import emit, write
from export.targets.onnx_reference import evaluate
from export.targets.state_io import explicit_state
from export.targets.tensorrt import TARGET
from export.targets.trt_engine import build_engine, choose_builder, profiles_of
from graphs.errors import GateError, UserError
from graphs.program import Program, Signature
from graphs.spec import Dim, TensorSpec
from runtimes.cuda import gpu_name
from runtimes.tensorrt_api import LIBRARIES
from tests.tiny import tiny_program

METHODS = ("vision_encoder", "token_embedding", "text_decoder")


@pytest.mark.parametrize(
    ("variant", "floats", "limit"),
    [("tiny", "float32", 1e-4), ("tiny-v2", "float16", 1e-2), ("tiny", "bfloat16", 5e-2)],
)
def test_every_engine_is_built(variant: str, floats: str, limit: float, tmp_path: Path) -> None:
    lines: list[str] = []
    program = TARGET.legalize(tiny_program(variant, floats))
    options = LowerOptions(
        floats, dict.fromkeys(program, Limit(limit)), extra={"builder": "tensorrt-rtx"}, progress=lines.append
    )
    made = TARGET.lower(program, tmp_path, options)
    check_engines(made, tmp_path, context={"tiny": 64, "tiny-v2": 192}[variant])
    assert made.details["builder"]["name"] == "tensorrt-rtx"
    assert set(made.checked) == set(made.files)
    for finding in made.checked.values():
        assert finding.endswith(f"parsed and built by TensorRT-RTX {made.versions['tensorrt-rtx']}")
        assert "relative L2" in finding
    assert any(line.startswith("text_decoder: TensorRT-RTX") for line in lines)
    assert any("preparing graph" in line for line in lines)


def check_engines(made: Lowered, directory: Path, context: int) -> None:
    """One file a method and nothing else, as long and headed as recorded, and free of this machine's paths."""
    assert sorted(p.name for p in directory.iterdir()) == sorted(f"{method}.engine" for method in METHODS)
    for method in METHODS:
        data = (directory / made.files[method]).read_bytes()
        recorded = made.details["methods"][method]
        assert recorded["bytes"] == len(data) > 100_000
        assert data.startswith(bytes.fromhex(recorded["header"]))
        assert data.startswith(b"vtrt")
        assert str(directory).encode() not in data
        assert recorded["layers"] > 0
    decoder = made.details["methods"]["text_decoder"]
    assert [p["sizes"]["sequence"] for p in decoder["profiles"]] == [(1, min(128, context), context)]
    assert decoder["state"]["past_key_values.0.key"] == "present.0.key"
    assert made.details["methods"]["vision_encoder"]["profiles"] == []


def test_profiles() -> None:
    embeds = TensorSpec("x", (1, Dim("sequence", 1, 2048), 8))
    prefill, decode = profiles_of(Signature((embeds,), ()), LIBRARIES["tensorrt"])
    assert [prefill.shape(embeds.shape, which) for which in range(3)] == [(1, 1, 8), (1, 128, 8), (1, 2048, 8)]
    assert {decode.shape(embeds.shape, which) for which in range(3)} == {(1, 1, 8)}
    (whole,) = profiles_of(Signature((embeds,), ()), LIBRARIES["tensorrt-rtx"])
    assert whole.sizes == prefill.sizes
    assert profiles_of(Signature((TensorSpec("x", (1, 8)),), ()), LIBRARIES["tensorrt"]) == ()


def test_builder_choice() -> None:
    with pytest.raises(UserError, match="unknown builder 'tensorrt-rxt': did you mean 'tensorrt-rtx'"):
        choose_builder("tensorrt-rxt")
    library, module = choose_builder("auto")
    if gpu_name() is None:
        assert library.name == "tensorrt-rtx"
        with pytest.raises(UserError, match=r"builder 'tensorrt' (is not installed|needs an NVIDIA GPU)"):
            choose_builder("tensorrt")
    assert module.__version__


@pytest.fixture(scope="module")
def embedding() -> Program:
    return explicit_state(tiny_program("tiny"))


def test_wrong_onnx_fails_the_gate(embedding: Program, tmp_path: Path) -> None:
    path = tmp_path / "token_embedding.onnx"
    write(emit(embedding, "token_embedding"), path)
    assert evaluate(embedding, "token_embedding", path, Limit(1e-4)).startswith("evaluated by onnxruntime")
    data = np.fromfile(f"{path}.data", np.float32)
    (data * 1.001).tofile(f"{path}.data")
    with pytest.raises(GateError, match=r"token_embedding: relative L2 .* is 1\.0e-03; the limit is 0.0001"):
        evaluate(embedding, "token_embedding", path, Limit(1e-4))


def test_refused_node_is_named(tmp_path: Path) -> None:
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], name="culprit", domain="nowhere")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=opsets), tmp_path / "bad.onnx")
    library, trt = choose_builder("tensorrt-rtx")
    signature = Signature((TensorSpec("x", (1,)),), (TensorSpec("y", (1,)),))
    with pytest.raises(GateError, match=r"TensorRT-RTX cannot parse bad\.onnx: node 'culprit' \(NoSuchOperator\)"):
        build_engine(library, trt, tmp_path / "bad.onnx", tmp_path / "bad.engine", signature, (), lambda line: None)
