"""Work that is taken over from exports that were interrupted, or that had the same inputs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.source import Calibration
from export.bundle import left_behind
from export.check import verify_bundle
from export.pieces import FINISHED, Pieces
from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.errors import UserError
from graphs.model import Request, locate
from graphs.weights import tensor_digest
from runtimes.manifest import MANIFEST, Bundle

#: how lines begin that say so
TAKEN = ("made of the same inputs", "finished before an export was interrupted")

NANO = locate("zoo:mobilevlm-nano")


def options(checkpoint: Path, out: Path, **more: Any) -> ExportOptions:
    return ExportOptions(Request("mobilevlm", checkpoint=str(checkpoint)), "onnxruntime", out=out, **more)


def told(made: ExportOptions) -> dict[str, str]:
    """What an export said of the methods that it took over."""
    lines: list[str] = []
    export(made, lines.append)
    rows = (line.strip().split(": ", 1) for line in lines)
    return {row[0]: row[1] for row in rows if len(row) == 2 and row[1].startswith(TAKEN)}


def files(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())["files"]
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(NANO, tmp_path / "checkpoint"))


def test_what_is_unchanged_is_taken_over_and_what_is_not_is_made(checkpoint: Path, tmp_path: Path) -> None:
    first = options(checkpoint, tmp_path / "a")
    assert told(first) == {}
    second = replace(first, out=tmp_path / "b")
    assert told(second) == dict.fromkeys(
        Bundle.open(tmp_path / "a").artifact.files, f"made of the same inputs in {first.out}"
    )
    assert files(tmp_path / "b") == files(tmp_path / "a")
    assert told(replace(second, force=True, anew=True)) == {}

    weights = load_file(checkpoint / "model.safetensors")
    name = next(key for key in weights if "mm_projector" in key and key.endswith("weight"))
    save_file({**weights, name: weights[name] * 1.01}, checkpoint / "model.safetensors", {"format": "pt"})
    third = replace(first, out=tmp_path / "c")
    assert set(told(third)) == {"token_embedding", "text_decoder"}
    assert files(tmp_path / "c")["vision_encoder.onnx.data"] != files(tmp_path / "a")["vision_encoder.onnx.data"]
    assert verify_bundle(tmp_path / "c", silent)


def test_the_same_again_is_left_alone_and_anything_else_refused(checkpoint: Path, tmp_path: Path) -> None:
    first = options(checkpoint, tmp_path / "a")
    export(first, silent)
    before = (tmp_path / "a" / MANIFEST).stat().st_mtime_ns
    assert "nothing to do" in told(first)[str(tmp_path / "a")]
    with pytest.raises(UserError, match="exists: choose another --out"):
        export(replace(first, recipe="mobile-small"), silent)
    assert (tmp_path / "a" / MANIFEST).stat().st_mtime_ns == before
    with (tmp_path / "a" / "text_decoder.onnx.data").open("r+b") as file:
        file.write(b"other")
    with pytest.raises(UserError, match="exists: choose another --out"):
        export(first, silent)
    assert set(told(replace(first, force=True))) == {
        "token_embedding",
        "vision_encoder",
    }  # what was harmed is made anew
    assert verify_bundle(tmp_path / "a", silent)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_export_goes_on_where_it_was(stop: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "b"
    arguments = ["export", "mobilevlm", "--target", "onnxruntime", "--out", str(out), "--quant", "mobile-balanced"]
    ours = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background jobs ignore it
    code = f"import signal, sys; {ours}; from export.cli import main; sys.exit(main(sys.argv[1:]))"
    count = ["--calibration-count", "8"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments, *count], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "text_decoder: writing" in line:
                process.send_signal(stop)
                break
        process.stderr.read()
    assert not out.exists()
    assert [FINISHED in {path.name for path in left.iterdir()} for left in left_behind(out)] == [True]
    made = ExportOptions(Request("mobilevlm"), "onnxruntime", "mobile-balanced", Calibration(count=8), out=out)
    assert set(told(made)) == {"statistics", "vision_encoder", "token_embedding"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert not [name for name in files(out) if name.startswith(".")]
    assert verify_bundle(out, silent)


def test_a_damaged_record_is_no_record(tmp_path: Path) -> None:
    for number, text in enumerate(("", "{", '{"pieces": 3}', '{"pieces": [{"key": "k", "files": 7, "record": {}}]}')):
        left = tmp_path / str(number)
        left.mkdir()
        (left / FINISHED).write_text(text)
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "secret").write_text("x")
    row = {"key": "k", "files": {"../secret": {"bytes": 1, "sha256": "0"}}, "record": {}}
    (outside / FINISHED).write_text(json.dumps({"pieces": [row]}))
    here = tmp_path / "here"
    here.mkdir()
    pieces = Pieces(here, [p for p in tmp_path.iterdir() if p.is_dir()], [], silent)
    assert pieces("it", lambda: "k", lambda: {"made": True}) == {"made": True}
    assert (tmp_path / "secret").read_text() == "x"


def test_digests_tell_types_and_shapes_apart() -> None:
    zeros = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(8, dtype=torch.bfloat16)]
    assert len({tensor_digest(tensor) for tensor in zeros}) == len(zeros)
    assert tensor_digest(torch.zeros(2, 2).T) == tensor_digest(torch.zeros(2, 2))
