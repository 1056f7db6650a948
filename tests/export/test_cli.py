"""The verbs on a bundle of the shipped checkpoint."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest

from calibration.samples import zoo_samples
from export.cli import main
from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.model import Request

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(
        ExportOptions(Request("mobilevlm"), "onnxruntime", out=tmp_path_factory.mktemp("out") / "nano"), silent
    )


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    sample = next(iter(zoo_samples(1, seed=11)))
    sample.image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def document(capfd: Capture, *arguments: str) -> dict[str, object]:
    assert main([*arguments, "--json"]) == 0
    value: dict[str, object] = json.loads(capfd.readouterr().out)
    return value


def test_run_answers_and_eager_agrees(bundle: Path, picture: Path, capfd: Capture) -> None:
    ask = ["run", str(bundle), "--image", str(picture), "--prompt", "How many objects are there?"]
    found = document(capfd, *ask)
    assert str(found["answer"]) in {"1", "2", "3", "4", "5"}
    assert document(capfd, *ask, "--runtime", "eager")["tokens"] == found["tokens"]
    assert main([*ask, "--quiet"]) == 0
    assert capfd.readouterr().out.strip() == found["answer"]


def test_run_without_a_picture(bundle: Path, capfd: Capture) -> None:
    found = document(capfd, "run", str(bundle), "--prompt", "How many objects are there?", "--max-new-tokens", "2")
    assert 1 <= len(found["tokens"]) <= 2  # type: ignore[arg-type]


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("corrupt.png", b"\x89PNG\r\n\x1a\nnot a picture", "corrupt.png"),
        ("bomb.png", png(200_000, 200_000), "decompression bomb"),
        ("empty.png", b"", "empty.png"),
        ("nothing.png", png(0, 5), "nothing.png"),
        ("text.txt", b"hello", "text.txt"),
        ("missing.png", None, "missing.png"),
    ],
)
def test_pictures_that_are_none(
    bundle: Path, tmp_path: Path, name: str, content: bytes | None, words: str, capfd: Capture
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["run", str(bundle), "--image", str(tmp_path / name), "--prompt", "?"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("vlmx: error: ")
    assert words in err


def test_a_prompt_longer_than_the_context(bundle: Path, picture: Path, capfd: Capture) -> None:
    prompt = "How many objects are there? " * 200
    assert main(["run", str(bundle), "--image", str(picture), "--prompt", prompt]) == 2
    assert "this bundle's context is" in capfd.readouterr().err


def test_a_bundle_that_is_none(tmp_path: Path, capfd: Capture) -> None:
    assert main(["run", str(tmp_path), "--prompt", "?"]) == 2
    assert "is not a bundle" in capfd.readouterr().err
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "is not a bundle" in capfd.readouterr().err


def test_another_targets_runtime(bundle: Path, capfd: Capture) -> None:
    assert main(["run", str(bundle), "--prompt", "?", "--runtime", "tensorrt"]) == 2
    assert "'onnxruntime' or 'eager'" in capfd.readouterr().err


def test_verify(bundle: Path, capfd: Capture) -> None:
    lower = document(capfd, "verify", str(bundle))["lower"]
    assert all(entry["passed"] for entry in lower.values())  # type: ignore[attr-defined]


def test_bench_measures(bundle: Path, capfd: Capture) -> None:
    (row,) = document(capfd, "bench", str(bundle), "--repeat", "2", "--new-tokens", "4")["rows"]  # type: ignore[misc]
    assert row["prompt_tokens"] == 36 + 16
    for column in ("vision_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms"):
        assert 0 < row[column] < 1e6
    assert row["ttft_ms"] > row["vision_ms"]
    assert row["peak_rss_bytes"] > 50 << 20
    assert main(["bench", str(bundle), "--repeat", "1", "--new-tokens", "2"]) == 0
    assert "decode_tokens_per_s" in capfd.readouterr().out


def test_list_and_doctor(capfd: Capture) -> None:
    listed = document(capfd, "list")
    assert set(listed["targets"]) == {"onnxruntime", "executorch", "coreml", "tensorrt"}  # type: ignore[call-overload]
    assert "mobilevlm-nano (trained" in listed["models"]["mobilevlm"]  # type: ignore[index]
    found = document(capfd, "doctor")["targets"]
    assert found["onnxruntime"]["lowers"].startswith("yes")  # type: ignore[index]
