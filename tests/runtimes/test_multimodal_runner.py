"""The stock client: ExecuTorch's unmodified MultimodalRunner answers held-out questions as the eager graph does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.samples import Sample, zoo_samples
from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.errors import UserError
from graphs.model import Request
from graphs.preprocess.prompt import TextSegment, segments
from runtimes.manifest import Bundle
from runtimes.multimodal_runner import StockRunner, answer
from runtimes.session import Session

QUESTIONS = 12


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = ExportOptions(Request("mobilevlm"), "executorch", out=tmp_path_factory.mktemp("out") / "nano")
    return Bundle.open(export(options, silent))


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> Session:
    return Session.open(bundle)


def ask(session: Session, sample: Sample) -> tuple[NDArray[np.uint8], str, str]:
    """What an app hands the runner: pixels [3, H, W], the prompt's text before them and after."""
    before, _, after = segments(session.template, sample.question, images=1)
    assert isinstance(before, TextSegment)
    assert isinstance(after, TextSegment)
    assert session.processor is not None
    return session.processor(sample.image)[0], before.text, after.text


def test_answers_are_the_eager_graphs(bundle: Bundle, session: Session) -> None:
    samples = list(zoo_samples(QUESTIONS, seed=11))
    eager, runner = Session.open(bundle, "eager"), StockRunner(bundle.directory)
    expected = [eager.answer(sample.question, [sample.image])[0] for sample in samples]
    assert len(set(expected)) > 3
    assert [session.answer(sample.question, [sample.image])[0] for sample in samples] == expected
    assert ["".join(runner.pieces(*ask(session, sample), 32)).strip() for sample in samples] == expected


def test_the_prompt_begins_with_one_token_that_begins_it(bundle: Bundle, session: Session) -> None:
    sample = next(zoo_samples(1, seed=3))
    parts = session.segments(sample.question, [sample.image])
    tokens = bundle.manifest["prompt"]["visual_tokens"]
    length = sum(len(part) if isinstance(part, list) else tokens for part in parts)
    pixels, before, after = ask(session, sample)
    assert parts[0] == [session.tokenizer.bos_id, *session.tokenizer.encode(before)]
    runner = StockRunner(bundle.directory)
    assert runner.prompt_tokens(pixels, before, after) == length


def test_one_call_answers_and_the_picture_matters(bundle: Bundle, session: Session) -> None:
    samples = [sample for sample in zoo_samples(60, seed=5) if sample.task == "caption"][:3]
    assert len({sample.question for sample in samples}) == 1
    assert len({answer(bundle.directory, *ask(session, sample), 32) for sample in samples}) > 1


def test_a_prompt_beyond_the_context_and_a_directory_without_tokenizer(bundle: Bundle, tmp_path: Path) -> None:
    runner = StockRunner(bundle.directory)
    side = bundle.manifest["prompt"]["image_size"]
    with pytest.raises(RuntimeError):
        runner.pieces(np.zeros((3, side, side), np.uint8), "a b c " * 200, "why?", 4)
    with pytest.raises(UserError, match="has no tokenizer"):
        StockRunner(tmp_path)


def test_the_runner_needs_no_transformers() -> None:
    code = "import sys; from runtimes.multimodal_runner import bindings; bindings().MultimodalRunner"
    code += "; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
