"""ExecuTorch's runtime: state that lasts and resets, and files that are not what they should be."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from export.gate import Limit
from export.targets.base import LowerOptions
from export.targets.executorch import FILE, TARGET
from graphs.errors import UserError
from graphs.spec import TensorSpec
from runtimes.base import Array, Artifact
from runtimes.executorch import HEADER, ExecuTorchRuntime
from tests.tiny import tiny_program

CONTEXT, WIDTH = 64, 64
EMBEDS = np.random.default_rng(0).normal(size=(1, CONTEXT, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    program = tiny_program("tiny")
    decoder = replace(program, methods={"text_decoder": program.methods["text_decoder"]})
    directory = tmp_path_factory.mktemp("decoder")
    made = TARGET.lower(
        TARGET.legalize(decoder), directory, LowerOptions("float32", dict.fromkeys(program, Limit(1e-4)))
    )
    signature = {"text_decoder": program.methods["text_decoder"].signature}
    return Artifact(directory, signature, made.files, made.details)


@pytest.fixture
def runtime(artifact: Artifact) -> ExecuTorchRuntime:
    return ExecuTorchRuntime.load(artifact)


def decode(runtime: ExecuTorchRuntime, start: int, stop: int) -> Array:
    """Logits [stop - start, V] of the positions from `start` to before `stop`."""
    (logits,) = runtime.call("text_decoder", [EMBEDS[:, start:stop], np.arange(start, stop)])
    return logits[0]


def test_version(runtime: ExecuTorchRuntime) -> None:
    assert runtime.version == "executorch 1.4.1"


def test_a_prompt_in_pieces_is_the_prompt_at_once(runtime: ExecuTorchRuntime) -> None:
    whole = decode(runtime, 0, CONTEXT)
    runtime.reset()
    cuts = (0, 1, 9, 10, 40, CONTEXT)
    pieces = np.concatenate([decode(runtime, start, stop) for start, stop in pairwise(cuts)])
    np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-5)
    assert whole.shape == (CONTEXT, 256)


def test_reset_forgets_everything_even_what_is_not_a_number(runtime: ExecuTorchRuntime) -> None:
    first = [decode(runtime, 0, 12), decode(runtime, 12, 13)]
    runtime.call("text_decoder", [np.full((1, 30, WIDTH), np.nan, np.float32), np.arange(13, 43)])
    assert np.isnan(decode(runtime, 13, 14)).any()  # 0 * NaN: a mask alone does not hide it
    runtime.reset()
    assert all(not cache.any() for cache in runtime.methods["text_decoder"].state)
    again = [decode(runtime, 0, 12), decode(runtime, 12, 13)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_two_runtimes_share_no_state(artifact: Artifact) -> None:
    one, other = ExecuTorchRuntime.load(artifact), ExecuTorchRuntime.load(artifact)
    decode(one, 0, 12)
    expected = decode(one, 12, 13)
    decode(other, 0, 5)
    assert not np.allclose(decode(other, 12, 13), expected)
    one.reset()
    decode(one, 0, 12)
    assert np.array_equal(decode(one, 12, 13), expected)


@pytest.mark.parametrize("positions", [[CONTEXT], [-1]])
def test_a_position_outside_the_cache_is_refused(runtime: ExecuTorchRuntime, positions: list[int]) -> None:
    with pytest.raises(RuntimeError):
        runtime.call("text_decoder", [EMBEDS[:, :1], np.array(positions)])


def damaged(artifact: Artifact, data: bytes, directory: Path) -> Artifact:
    (directory / FILE).write_bytes(data)
    return replace(artifact, directory=directory)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.0005, 0.5, 0.99999])
def test_a_file_cut_short(artifact: Artifact, share: float, tmp_path: Path) -> None:
    data = (artifact.directory / FILE).read_bytes()
    with pytest.raises(UserError, match=r"too few|cut short"):
        ExecuTorchRuntime.load(damaged(artifact, data[: int(len(data) * share)], tmp_path))


def test_other_kinds_of_files(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an ExecuTorch program"):
        ExecuTorchRuntime.load(damaged(artifact, b"PK\3\4" + bytes(100), tmp_path))
    with pytest.raises(UserError, match="No such file"):
        ExecuTorchRuntime.load(replace(artifact, directory=tmp_path / "nowhere"))
    header = HEADER.pack(8, b"ET12", b"eh00", HEADER.size, 200, 0, 0)
    with pytest.raises(UserError, match="cannot load method 'text_decoder'"):
        ExecuTorchRuntime.load(replace(damaged(artifact, header + bytes(200), tmp_path), details={}))


@pytest.mark.parametrize("place", [0.01, 0.1, 0.3, 0.9])
def test_a_flipped_bit_never_reaches_the_runtime(artifact: Artifact, place: float, tmp_path: Path) -> None:
    data = bytearray((artifact.directory / FILE).read_bytes())
    data[int(len(data) * place)] ^= 4
    with pytest.raises(UserError, match="damaged: its sha256"):
        ExecuTorchRuntime.load(damaged(artifact, bytes(data), tmp_path))


def test_a_file_of_another_model(artifact: Artifact) -> None:
    signature = artifact.signatures["text_decoder"]
    renamed = replace(artifact, signatures={"decoder": signature}, files={"decoder": FILE})
    with pytest.raises(UserError, match="cannot load method 'decoder'"):
        ExecuTorchRuntime.load(renamed)
    state = (*signature.state, TensorSpec("layers.2.cache.k", (1, 2, 64, 16)))
    deeper = replace(artifact, signatures={"text_decoder": replace(signature, state=state)})
    with pytest.raises(UserError, match="cannot load method 'text_decoder'"):
        ExecuTorchRuntime.load(deeper)
