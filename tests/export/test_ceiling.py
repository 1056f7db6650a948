"""`--max-memory`: sizes, the estimate, its refusal, and the watch."""

from __future__ import annotations

import math
import mmap
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from calibration import sweep
from export.ceiling import NEARLY, Widest, check_memory, largest_bytes, needed, parse_bytes, watched
from export.memory import resident_bytes
from export.sample import Sample, float32_bytes
from export.stability import part
from export.targets.base import TARGETS, load_target
from graphs.errors import UserError
from quant.recipe import recipe
from quant.resolve import resolve
from tests.tiny import tiny_program


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2 << 30), ("1.5 gib", 3 << 29), ("900MB", 900_000_000), ("512m", 512 << 20), ("4096", 4096)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "2 GiX", "0", "1e400", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size|is not above 0"):
        parse_bytes(text)


def test_stages_and_their_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    program = tiny_program("tiny")
    table = load_target("onnxruntime").capabilities
    plain, learned = (
        resolve(recipe(name), program, "onnxruntime", table) for name in ("reference-fp32", "mobile-small")
    )
    some = Sample.choose(program, program, "sample").of(program)
    sampled, whole = (needed(table, program, checked, plain, 64, 9) for checked in (some, program))
    assert set(sampled) == {"verify", "lower"}
    found = Widest.of(some, table)
    by_torch = float32_bytes(some) + (64 << 20) + 3 * found.value + found.state
    assert sampled["verify"] - table.base_bytes == by_torch > 1.15 * plain.weight_bytes(some) + 13 * found.value
    assert sampled["verify"] < whole["verify"]
    monkeypatch.setattr(sweep, "LEAST_BYTES", 1)  # else it is one stretch, and samples pass nothing on
    monkeypatch.setattr(sweep, "MOST_BYTES", 1)
    calibrated = needed(table, program, some, learned, 64, 9)
    assert "calibrate" not in needed(table, program, some, learned, 0, 9)  # read from a file
    width = max(layer.inputs for layer, _, _ in learned.layers.values())
    assert calibrated["calibrate"] - table.base_bytes > 8 * width**2
    assert calibrated["calibrate"] - needed(table, program, some, learned, 1, 9)["calibrate"] > 63 * 4 * width
    check_memory(whole, None)
    check_memory(whole, max(whole.values()))
    with pytest.raises(
        UserError, match=r"0\.10 GiB is not enough: verify will take about .* --verify sample takes less"
    ):
        check_memory(whole, 100 << 20)
    with pytest.raises(UserError, match=r"calibrate will take about .* a recipe without calibration"):
        check_memory({**sampled, "calibrate": 2 * sampled["lower"]}, 100 << 20)


def test_every_target_says_what_it_takes() -> None:
    for name in TARGETS:
        assert load_target(name).capabilities.base_bytes >= 500 << 20


def grow(held: list[mmap.mmap], ceiling: int) -> None:
    """Take memory, a MiB at a time and none that was freed before, until someone stops it."""
    with watched(ceiling):
        while len(held) < 4000:
            held.append(mmap.mmap(-1, 1 << 20))
            held[-1].write(b"1" * (1 << 20))


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])  # in a shell's background: ignored
def test_the_watch_stops_what_goes_beyond(handler: Any, request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    held: list[mmap.mmap] = []
    with pytest.raises(UserError, match="stopped: the export was about to take more than --max-memory"):
        grow(held, int((resident_bytes() + (100 << 20)) / NEARLY))
    assert 50 < len(held) < 1000
    with watched(resident_bytes() + (1 << 30)):
        assert len(held) > 50


def test_an_interrupt_of_the_users_is_one() -> None:
    with pytest.raises(KeyboardInterrupt), watched(1 << 40):
        raise KeyboardInterrupt


def test_the_command_refuses_before_it_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export.cli", "export", "mobilevlm", "--target", "onnxruntime", "--quiet"]
    out = tmp_path / "made" / "b"
    done = subprocess.run([*command, "--max-memory", "500MiB", "--out", str(out)], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "--max-memory 0.49 GiB is not enough: verify will take about" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_largest_value_and_the_largest_weight() -> None:
    program = tiny_program("tiny")
    decoder = part(program, ["text_decoder"])
    tables = [load_target(name).capabilities for name in ("executorch", "onnxruntime")]
    found, blocks = (Widest.of(decoder, table) for table in tables)
    assert found.state == sum(4 * math.prod(spec.size({})) for spec in decoder.methods["text_decoder"].signature.state)
    scores = 4 * 4 * 12 * 64  # heads, tokens, context
    assert (found.scores, blocks.scores) == (int(4.3 * scores), int(3.0 * scores))
    towers = [Widest.of(part(program, ["vision_encoder"]), table) for table in tables]
    assert towers[0].scores > towers[1].scores == 0  # nothing is masked there
    caches = {4 * math.prod(spec.size({})) for spec in decoder.methods["text_decoder"].signature.state}
    assert {2 * size for size in caches} == {found.value}  # repeated for two heads each
    table = tables[1]
    assert Widest.of(program, table).value == max(Widest.of(part(program, [n]), table).value for n in program)
    plain, coded = (resolve(recipe(name), program, "onnxruntime", table) for name in ("reference-fp32", "mobile-fast"))
    most = max(fake.numel() for traced in program.methods.values() for fake in traced.exported.state_dict.values())
    assert largest_bytes(program, plain) == 6 * most
    assert most < largest_bytes(program, coded) <= int(3.7 * most)
