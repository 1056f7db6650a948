"""A user's mistake: one line naming the cause and the nearest choice, exit status 2, nothing written."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from export.cli import main
from tests.checkpoints import reference, write

Capture = pytest.CaptureFixture[str]


def refused(capfd: Capture, *arguments: str) -> str:
    """The one line that a refused command prints."""
    try:
        status = main([*arguments, "--quiet"])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("vlmx:")]
    assert status == 2, err
    assert out == ""
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def export(out: Path, *more: str, target: str = "onnxruntime", model: str = "mobilevlm") -> list[str]:
    return ["export", model, "--target", target, "--out", str(out), *more]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variant", "tiny", "--target", "onxruntime"], "unknown target 'onxruntime': did you mean 'onnxruntime'"),
        (["--variant", "tinny"], "unknown variant 'tinny' of mobilevlm: did you mean 'tiny'"),
        (["--variant", "tiny", "--quant", "reference-fp23"], "unknown recipe 'reference-fp23': did you mean"),
        (["--variant", "tiny", "--compress", "prone{keep=4}"], "unknown pass 'prone': did you mean 'prune'"),
        (["--variant", "tiny", "--compress", "prune{keep=10}"], "keep=10 is more than the 9 tokens there are"),
        (["--variant", "tiny", "--max-context", "0"], "max-context"),
        (["--checkpoint", "no/such/place"], "no/such/place"),
        (["--checkpoint", "zoo:mobilevlm-nana"], "mobilevlm-nan"),
    ],
)
def test_names(arguments: list[str], words: str, tmp_path: Path, capfd: Capture) -> None:
    assert words in refused(capfd, *export(tmp_path / "b"), *arguments)
    assert not any(tmp_path.iterdir())


def test_unknown_model_and_command(tmp_path: Path, capfd: Capture) -> None:
    assert "did you mean 'mobilevlm'" in refused(capfd, *export(tmp_path / "b", model="mobilevml"))
    assert "invalid choice" in refused(capfd, "exprot")


Spoil = Callable[[Path], None]


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def not_safetensors(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(500))


def header_bomb(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def only_pickle(directory: Path) -> None:
    no_weights(directory)
    torch.save({}, directory / "pytorch_model.bin")


def shards_elsewhere(directory: Path) -> None:
    weight_map = {"model.norm.weight": "../outside.safetensors"}
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def absurd_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 1 << 60}))


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate, "model.safetensors"),
        (not_safetensors, "model.safetensors"),
        (header_bomb, "model.safetensors"),
        (no_weights, "safetensors"),
        (only_pickle, "--allow-pickle"),
        (shards_elsewhere, "outside"),
        (absurd_config, "intermediate_size"),
        (no_config, "config.json"),
    ],
)
def test_hostile_checkpoints(spoil: Spoil, words: str, tmp_path: Path, capfd: Capture) -> None:
    directory = write(tmp_path / "checkpoint", reference())
    spoil(directory)
    assert words in refused(capfd, *export(tmp_path / "b", "--checkpoint", str(directory)))
    assert not (tmp_path / "b").exists()


def test_nan_weights_are_refused_by_name_unless_allowed(tmp_path: Path, capfd: Capture) -> None:
    made = reference()
    made.tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    directory = write(tmp_path / "checkpoint", made)
    line = refused(capfd, *export(tmp_path / "b", "--checkpoint", str(directory)))
    assert "model.layers.1.mlp.up_proj.weight" in line
    assert "--allow-nan" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_destinations(tmp_path: Path, capfd: Capture) -> None:
    tiny = ["--variant", "tiny"]
    (tmp_path / "file").write_text("mine")
    assert "not a directory" in refused(capfd, *export(tmp_path / "file", *tiny))
    assert "cannot write" in refused(capfd, *export(tmp_path / "file" / "below", *tiny))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("mine")
    assert "exists" in refused(capfd, *export(tmp_path / "kept", *tiny))
    assert "no bundle" in refused(capfd, *export(tmp_path / "kept", *tiny, "--force"))
    assert (tmp_path / "kept" / "thesis.txt").read_text() == "mine"
    assert "cannot write" in refused(capfd, *export(Path("/proc/nowhere/b"), *tiny))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kept"]


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on file size stands in for a disk that fills up while lowering."""
    code = "import sys; from export.cli import main; sys.exit(main(sys.argv[1:]))"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [sys.executable, "-B", "-c", code, *export(tmp_path / "b", "--variant", "tiny", "--quiet")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("vlmx: error")]) == 1
    assert os.listdir(tmp_path) == []


def test_no_room_is_found_out_before_lowering(tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("export.pipeline.shutil.disk_usage", lambda path: usage(10, 10, 1000))
    assert "MiB free" in refused(capfd, *export(tmp_path / "b", "--variant", "tiny"))
    assert os.listdir(tmp_path) == []
