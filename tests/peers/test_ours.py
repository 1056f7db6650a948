"""A bundle of ours as a contender: in floats, each measure's output is that of the source model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs import registry
from graphs.model import Request
from peers.load import CONTEXT, MEASURES
from peers.process import Process
from peers.rows import accuracy
from zoo.random_checkpoint import write


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with room for the prompt, its float32 bundle, and the reference."""
    directory = tmp_path_factory.mktemp("ours")
    tiny = registry.variant("mobilevlm", "tiny")
    text = replace(tiny.architecture.text, max_position_embeddings=CONTEXT)  # type: ignore[attr-defined]
    write(directory / "checkpoint", replace(tiny, architecture=replace(tiny.architecture, text=text)))  # type: ignore[call-arg]
    request = Request("mobilevlm", checkpoint=str(directory / "checkpoint"), max_context=CONTEXT)
    export(ExportOptions(request, "onnxruntime", "reference-fp32", out=directory / "made/bundle"), silent)
    (directory / "reference").mkdir()
    arguments = [str(directory / "reference"), str(directory / "checkpoint")]
    subprocess.run([sys.executable, "-m", "peers.ours.reference", *arguments], check=True)
    return directory


def test_every_measure_gives_what_the_source_gives(place: Path, tmp_path: Path) -> None:
    process = Process(["peers.worker", "peers.ours.worker", str(place / "made")], tmp_path / "log")
    assert process.hello["measures"] == list(MEASURES)
    for measure in MEASURES:
        answer = process.ask(do=measure, save=str(tmp_path / f"mine-{measure}.npy"))
        assert answer["finite"]
    process.end()
    found = accuracy("mine", tmp_path, place / "reference")
    assert set(found) == set(MEASURES)
    assert min(found.values()) > 80


def test_another_order_of_tokens_is_another_picture(place: Path, tmp_path: Path) -> None:
    other = np.load(place / "reference/vision_class_last.npy")
    np.save(tmp_path / "theirs-vision.npy", other)
    found = accuracy("theirs", tmp_path, place / "reference")
    assert found["vision"] < 10
    assert found["vision_class_last"] == float("inf")
