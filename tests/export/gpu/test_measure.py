"""What is timed on a GPU: the engines' side over an imitated library, torch's side on the CPU."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.gpu import engine, reference
from export.gpu.timing import calls_of, inputs_of, median_ms
from export.pipeline import ExportOptions, export
from export.stages import silent
from export.verify import compare, load_vectors, record
from graphs.model import Request
from runtimes.eager import EagerRuntime
from runtimes.manifest import Bundle
from runtimes.tensorrt import TensorRTRuntime
from tests.runtimes import fake_trt
from tests.runtimes.test_tensorrt_runtime import pretend
from tests.tiny import tiny_program


def test_times_are_those_of_settled_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0] + [0.03] * 5 + [0.02] * 5 + [0.004] * 5 + [0.0041] * 5)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def run() -> None:
        clock[0] += next(seconds)

    assert median_ms(run, window=0.0) == pytest.approx(4.1)
    assert next(seconds, None) is None, "one window after the first that was no slower"


def test_the_calls_that_are_timed() -> None:
    inputs = inputs_of({name: t.signature for name, t in tiny_program("tiny").methods.items()}, 20)
    calls = calls_of(inputs)
    assert {name: method for name, (method, _) in calls.items()} == {
        "vision_ms": "vision_encoder",
        "prefill_ms": "text_decoder",
        "decode_ms": "text_decoder",
    }
    prefill, decode = calls["prefill_ms"][1], calls["decode_ms"][1]
    assert (prefill[0].shape[1], decode[0].shape[1]) == (20, 1)
    assert list(decode[1]) == [20]


def test_engines_are_timed_where_their_inputs_lie(tmp_path: Path) -> None:
    program = tiny_program("tiny")
    runtime = TensorRTRuntime(fake_trt, fake_trt.HostMemory(), pretend("float32", tmp_path, list(program)))
    inputs = inputs_of(runtime.signatures, 6)
    expected = record(EagerRuntime(program), inputs)
    record(runtime, inputs)
    times = engine.device_times(runtime, inputs, window=0.0)
    assert set(times) == {"vision_ms", "prefill_ms", "decode_ms"}
    assert all(0 < each < 10_000 for each in times.values())
    runs = runtime.engines["text_decoder"]._engine.runs
    timed = runs[4:]  # after a prefill and three steps
    profiles = [profile for profile, _ in timed]
    assert profiles == sorted(profiles)
    assert profiles.count(0) >= 11
    assert profiles.count(1) >= 11
    assert all(addresses == timed[0][1] for profile, addresses in timed if profile == 0), "one state, read every time"
    errors = compare(record(runtime, inputs), expected)  # and what follows a reset is as it was
    assert all(error["relative_l2"] < 1e-4 for error in errors.values())


def test_answers_and_checks_are_those_of_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "NEW_TOKENS", 6)
    program = tiny_program("tiny")
    options = ExportOptions(Request("mobilevlm", "tiny"), "onnxruntime", "reference-fp32", out=tmp_path / "bundle")
    bundle = Bundle.open(export(options, silent))
    runtime = TensorRTRuntime(fake_trt, fake_trt.HostMemory(), pretend("float32", tmp_path, list(program)))
    assert engine.prompt_length(bundle) == 64 - 6
    found = engine.answers(runtime, bundle)
    assert found["first_token_ms"] > 0
    assert found["decode_tokens_per_s"] > 0
    lower = engine.checked(runtime, bundle)
    assert all(entry["executed"] and entry["relative_l2"] <= entry["limit"] for entry in lower.values())
    sampled = replace(bundle, manifest={**bundle.manifest, "left_out": {"text_decoder": ["layers.1"]}})
    recorded = engine.checked(runtime, sampled)
    assert recorded == {name: entry["lower"] for name, entry in bundle.manifest["verification"].items()}


def test_torch_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(module: object) -> object:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setitem(reference.MODES, "torch.compile", fails)
    rows, outputs = tmp_path / "rows.json", tmp_path / "outputs.safetensors"
    reference.measure("zoo:mobilevlm-nano", rows, outputs, "cpu", window=0.0)
    eager, compiled = json.loads(rows.read_text())
    assert eager["by"] == "torch eager"
    assert all(eager[name] > 0 for name in ("vision_ms", "prefill_ms", "decode_ms"))
    assert compiled["failed"] == "RuntimeError: no compiler here"
    program, prompt = reference.half("zoo:mobilevlm-nano")
    assert prompt == 160
    signatures = {name: traced.signature for name, traced in program.methods.items()}
    given = load_vectors(outputs, signatures)
    assert [call.inputs[0].shape[1] for call in given["text_decoder"]] == [160, 1, 1, 1]
    again = record(EagerRuntime(program), inputs_of(signatures, prompt))
    assert all(error["relative_l2"] < 1e-2 for error in compare(given, again).values())
    assert all(np.isfinite(call.outputs[0]).all() for calls in given.values() for call in calls)


def test_a_cpu_build_of_torch_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["reference", "zoo:mobilevlm-nano", "rows", "outputs"])
    assert reference.main() == 3
    told = capsys.readouterr().err
    assert told.startswith("not run: torch 2.13.0")
    assert told.rstrip().endswith("is a CPU build; give another interpreter as TORCH_PYTHON=")
