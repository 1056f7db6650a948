"""`vlmx calibrate`: a file whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration.statistics import Statistics
from export.cli import main
from tests.tiny import tiny_program

Capture = pytest.CaptureFixture[str]


def test_statistics_are_written_and_not_overwritten(tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "stats.safetensors"
    command = ["calibrate", "mobilevlm", "--variant", "tiny", "--count", "2", "--out", str(out)]
    assert main([*command, "--json"]) == 0
    printed, progress = capfd.readouterr()
    document = json.loads(printed)
    assert "text_decoder: 1 of 1 stretches" in progress
    found = Statistics.load(out, tiny_program("tiny"))
    assert document["origin"] == json.loads(json.dumps(found.origin.to_json()))
    assert (document["layers"], document["origin"]["count"]) == (len(found), 2)

    before = out.read_bytes()
    assert main(command) == 2
    assert "give --force" in capfd.readouterr().err
    assert main([*command, "--force", "--compress", "pool{factor=3}", "--quiet"]) == 0
    out_text, err = capfd.readouterr()
    assert "2 samples of zoo (2 with a picture), tokens: 2 image" in out_text
    assert not err
    assert out.read_bytes() != before
    assert Statistics.load(out).origin.passes.startswith("pool{factor=3")


def test_nothing_is_left_behind(tmp_path: Path, capfd: Capture) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "list.jsonl").write_text('{"question": "?"}\n{\n')
    out = tmp_path / "stats.safetensors"
    assert main(["calibrate", "mobilevlm", "--variant", "tiny", "--data", str(data), "--out", str(out)]) == 2
    assert "1 good samples, at least 8 are needed; 1 were unreadable" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert main(["calibrate", "mobilevlm", "--data", "zooo", "--out", str(out)]) == 2
    assert "name calibration data as zoo, a folder" in capfd.readouterr().err
    assert main(["calibrate", "mobilevlm", "--out", str(tmp_path)]) == 2
    assert "is not a plain file" in capfd.readouterr().err
