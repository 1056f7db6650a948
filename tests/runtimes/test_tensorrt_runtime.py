"""The TensorRT runtime's own logic, with real numbers: TensorRT's interface is played by ONNX Runtime."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.targets.base import LIMITS
from export.targets.onnx_graph import emit, write
from export.targets.state_io import explicit_state, state_pairs
from export.verify import compare, program_signatures, record, seeded_inputs
from graphs.errors import UserError
from runtimes import cuda
from runtimes.base import Artifact, Unavailable, load_runtime
from runtimes.eager import EagerRuntime
from runtimes.tensorrt import TensorRTRuntime
from tests.runtimes import fake_trt
from tests.tiny import tiny_program


def pretend(floats: str, directory: Path, wanted: Sequence[str]) -> Artifact:
    """An artefact whose engine files are ONNX files."""
    program = tiny_program("tiny", floats)
    explicit = explicit_state(program)
    files, methods = {}, {}
    for method in wanted:
        write(emit(explicit, method), directory / "whole.onnx")
        data = onnx.load(directory / "whole.onnx").SerializeToString()
        files[method] = f"{method}.engine"
        (directory / files[method]).write_bytes(data)
        pairs = state_pairs(explicit.methods[method].signature)
        methods[method] = {"state": pairs, "bytes": len(data), "header": data[:16].hex()}
    details = {"builder": {"name": "tensorrt-rtx", "version": "0.0"}, "methods": methods}
    return Artifact(directory, program_signatures(program), files, details)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return pretend("float32", tmp_path_factory.mktemp("fp32"), list(tiny_program("tiny")))


def engine_of(runtime: TensorRTRuntime, method: str) -> fake_trt.Engine:
    engine: fake_trt.Engine = runtime.engines[method]._engine
    return engine


def test_numbers_profiles_and_caches(artifact: Artifact) -> None:
    memory = fake_trt.HostMemory()
    runtime = TensorRTRuntime(fake_trt, memory, artifact)
    assert runtime.version == "TensorRT-RTX 0.0 on a host"
    program = tiny_program("tiny")
    inputs = seeded_inputs(program_signatures(program), seed=2)
    expected = record(EagerRuntime(program), inputs)
    for _ in range(2):  # the second time after a reset, over caches that were used
        errors = compare(record(runtime, inputs), expected)
        assert all(error["relative_l2"] <= LIMITS["float32"] for error in errors.values()), errors
    runs = engine_of(runtime, "text_decoder").runs
    assert [profile for profile, _ in runs] == [0, 1, 1, 1] * 2
    assert engine_of(runtime, "vision_encoder").profiles_in_use == [0]
    for (_, before), (_, after) in pairwise(runs[:4]):
        for past, present in artifact.details["methods"]["text_decoder"]["state"].items():
            assert after[past] == before[present]
            assert after[present] == before[past]


def test_half_precision_caches(tmp_path: Path) -> None:
    artifact = pretend("float16", tmp_path, ["text_decoder"])
    program = tiny_program("tiny", "float16")
    inputs = {"text_decoder": seeded_inputs(program_signatures(program))["text_decoder"]}
    actual = record(TensorRTRuntime(fake_trt, fake_trt.HostMemory(), artifact), inputs)
    assert actual["text_decoder"][0].outputs[0].dtype == np.float32
    errors = compare(actual, record(EagerRuntime(program), inputs))
    assert errors["text_decoder"]["relative_l2"] <= LIMITS["float16"]


def test_memory_is_given_back(artifact: Artifact) -> None:
    memory = fake_trt.HostMemory()
    runtime = TensorRTRuntime(fake_trt, memory, artifact)
    for length in (3, 9, 2):
        (call,) = artifact.signatures["text_decoder"].method("text_decoder").examples(lengths=(length,))
        runtime.call("text_decoder", [tensor.numpy() for tensor in call])
    assert len(memory.live) == 2 * 4 + 3, "two buffers a cache, one each for embeddings, positions and logits"
    del runtime
    gc.collect()
    assert memory.live == {}


def test_shapes_beyond_every_profile(artifact: Artifact) -> None:
    runtime = TensorRTRuntime(fake_trt, fake_trt.HostMemory(), artifact)
    with pytest.raises(ValueError, match="no optimisation profile"):
        runtime.call("text_decoder", [np.zeros((1, 65, 64), np.float32), np.arange(65)])
    with pytest.raises(ValueError, match="no optimisation profile"):
        runtime.call("vision_encoder", [np.zeros((1, 3, 40, 48), np.uint8)])


DAMAGE = {
    "cut short or damaged": lambda good: (good[:-1], {}),
    "its header differs": lambda good: (bytes(len(good)), {}),
    "cannot load it: built for another GPU": lambda good: (b"ftrt" + bytes(60), {"bytes": 64, "header": b"ftrt".hex()}),
    "no such file": lambda good: (None, {}),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_damaged_engines(words: str, artifact: Artifact, tmp_path: Path) -> None:
    data, recorded = DAMAGE[words]((artifact.directory / "vision_encoder.engine").read_bytes())
    if data is not None:
        (tmp_path / "vision_encoder.engine").write_bytes(data)
    methods = {"vision_encoder": {**artifact.details["methods"]["vision_encoder"], **recorded}}
    files = {"vision_encoder": "vision_encoder.engine"}
    bad = replace(artifact, directory=tmp_path, files=files, details={**artifact.details, "methods": methods})
    with pytest.raises(UserError, match=words) as error:
        TensorRTRuntime(fake_trt, fake_trt.HostMemory(), bad)
    assert "\n" not in str(error.value)


def test_without_a_gpu(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", "libno-such-driver.so")
    assert cuda.gpu_name() is None
    with pytest.raises(Unavailable, match="no NVIDIA GPU here"):
        load_runtime("tensorrt", artifact)
