"""Checkpoints in the public layout, honest and hostile."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from graphs.checkpoint import Checkpoint
from graphs.safetensors_io import write_safetensors
from tests.graphs.test_safetensors_io import TENSORS, refusal, same


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A whole checkpoint in one file, written by the reference library."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "toy"}')
    safetensors.torch.save_file(TENSORS, path / "model.safetensors")
    return path


def test_a_file_of_the_reference_library_reads_back(directory: Path) -> None:
    with Checkpoint.open(directory) as checkpoint:
        assert checkpoint.config == {"model_type": "toy"}
        assert checkpoint.names() == sorted(TENSORS)
        assert checkpoint.files == (directory / "config.json", directory / "model.safetensors")
        for name, tensor in TENSORS.items():
            assert checkpoint.shape(name) == tensor.shape
            assert checkpoint.dtype(name) == tensor.dtype
            assert same(checkpoint.tensor(name), tensor)
            checkpoint.release(name)
            assert same(checkpoint.tensor(name), tensor)


def test_tensors_outlive_the_checkpoint_and_edits_stay_in_memory(directory: Path) -> None:
    before = (directory / "model.safetensors").read_bytes()
    checkpoint = Checkpoint.open(directory)
    tensor = checkpoint.tensor("a.weight")
    checkpoint.close()
    assert torch.equal(tensor, TENSORS["a.weight"])
    tensor.add_(1)
    assert (directory / "model.safetensors").read_bytes() == before


def test_shards_with_and_without_an_index(tmp_path: Path) -> None:
    files = write_safetensors(tmp_path / "model.safetensors", TENSORS, max_shard_bytes=24)
    names = [file.name for file in files]
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + ["model.safetensors.index.json"]
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as indexed:
        assert {file.name for file in indexed.files} == {"config.json", *names}
        assert all(same(indexed.tensor(name), tensor) for name, tensor in TENSORS.items())
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    files[-1].unlink()
    with Checkpoint.open(tmp_path) as loose:
        assert loose.names() == sorted(TENSORS)
        assert all(same(loose.tensor(name), tensor) for name, tensor in TENSORS.items())


def test_rewriting_in_another_layout_leaves_no_stale_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for limit, value in ((None, 1.0), (4, 2.0), (None, 3.0)):
        write_safetensors(
            tmp_path / "model.safetensors", {"x": torch.tensor([value]), "y": torch.tensor([value])}, limit
        )
        with Checkpoint.open(tmp_path) as checkpoint:
            assert [checkpoint.tensor(name).item() for name in ("x", "y")] == [value, value]


# ---- what may be missing


def test_missing_parts_are_named_with_what_is_there(tmp_path: Path, directory: Path) -> None:
    assert "not a directory" in refusal(lambda: Checkpoint.open(tmp_path / "absent"))
    assert "not a directory" in refusal(lambda: Checkpoint.open(directory / "config.json"))
    (directory / "config.json").unlink()
    assert refusal(lambda: Checkpoint.open(directory)).endswith("holds model.safetensors")
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").unlink()
    message = refusal(lambda: Checkpoint.open(directory))
    assert "no *.safetensors there" in message
    assert message.endswith("it holds config.json")


def test_empty_weights_are_refused(directory: Path) -> None:
    write_safetensors(directory / "model.safetensors", {})
    assert "hold no tensors" in refusal(lambda: Checkpoint.open(directory))


# ---- indices and links


def shard(directory: Path, weight_map: object, **files: dict[str, torch.Tensor]) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, tensors in files.items():
        safetensors.torch.save_file(tensors, directory / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("target", "cause"),
    [
        ("../outside.safetensors", "points outside the directory"),
        ("/etc/outside.safetensors", "points outside the directory"),
        ("sub/../../outside.safetensors", "points outside the directory"),
        ("absent.safetensors", "no such file"),
        ("../../etc/passwd", "must end in .safetensors"),
        (7, "must end in .safetensors"),
    ],
)
def test_an_index_names_only_files_of_its_directory(directory: Path, target: object, cause: str) -> None:
    safetensors.torch.save_file({"x": torch.ones(1)}, directory.parent / "outside.safetensors")
    shard(directory, {"x": target})
    assert cause in refusal(lambda: Checkpoint.open(directory))


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map_is_refused(directory: Path, weight_map: object) -> None:
    shard(directory, weight_map)
    assert "has no weight_map" in refusal(lambda: Checkpoint.open(directory))


def test_an_index_that_names_what_a_shard_lacks(directory: Path) -> None:
    shard(directory, {"x": "one.safetensors", "y": "one.safetensors"}, one={"x": torch.ones(1)})
    assert "one.safetensors lacks tensor 'y'" in refusal(lambda: Checkpoint.open(directory))


def test_a_tensor_in_two_shards(directory: Path) -> None:
    both = {"one": {"x": torch.ones(1)}, "two": {"x": torch.zeros(1), "y": torch.ones(1)}}
    shard(directory, {"x": "one.safetensors", "y": "two.safetensors"}, **both)
    assert "'x' is in one.safetensors and in two.safetensors" in refusal(lambda: Checkpoint.open(directory))
    (directory / "model.safetensors.index.json").unlink()
    assert "'x' is in one.safetensors and in two.safetensors" in refusal(lambda: Checkpoint.open(directory))


def test_links_may_not_leave_the_directory(directory: Path, tmp_path: Path) -> None:
    path = directory / "model.safetensors"
    inside = directory / "real.bin"
    path.rename(inside)
    path.symlink_to("real.bin")
    assert Checkpoint.open(directory).names() == sorted(TENSORS)
    inside.rename(tmp_path / "outside.bin")
    assert "broken link" in refusal(lambda: Checkpoint.open(directory))
    path.unlink()
    path.symlink_to(tmp_path / "outside.bin")
    assert "points outside its directory" in refusal(lambda: Checkpoint.open(directory))
    path.unlink()
    path.symlink_to("model.safetensors")
    assert "broken link" in refusal(lambda: Checkpoint.open(directory))
    path.unlink()
    path.mkdir()
    assert "not a regular file" in refusal(lambda: Checkpoint.open(directory))
    path.rmdir()
    os.mkfifo(path)
    assert "not a regular file" in refusal(lambda: Checkpoint.open(directory))


def test_the_hub_cache_layout_opens_and_only_into_its_blobs(directory: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    shared = tmp_path / "hub" / "blobs" / "12"
    for place in (snapshot, blobs, shared):
        place.mkdir(parents=True)
    (directory / "config.json").rename(blobs / "c0")
    (directory / "model.safetensors").rename(shared / "w0")
    (blobs / "w0").symlink_to("../../blobs/12/w0")
    (snapshot / "config.json").symlink_to("../../blobs/c0")
    (snapshot / "model.safetensors").symlink_to("../../blobs/w0")
    with Checkpoint.open(snapshot) as checkpoint:
        assert same(checkpoint.tensor("a.weight"), TENSORS["a.weight"])
    (shared / "w0").rename(tmp_path / "w0")
    (blobs / "w0").unlink()
    (blobs / "w0").symlink_to(tmp_path / "w0")
    assert "points outside its directory" in refusal(lambda: Checkpoint.open(snapshot))


# ---- pickles


class Exploit:
    """Unpickling this runs a command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


def pickled(directory: Path, value: object, name: str = "pytorch_model.bin", **options: Any) -> Path:
    (directory / "model.safetensors").unlink(missing_ok=True)
    torch.save(value, directory / name, **options)
    return directory


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_only_behind_the_flag(directory: Path, zipped: bool) -> None:
    pickled(directory, TENSORS, _use_new_zipfile_serialization=zipped)
    assert "--allow-pickle" in refusal(lambda: Checkpoint.open(directory))
    with Checkpoint.open(directory, allow_pickle=True) as checkpoint:
        assert checkpoint.names() == sorted(TENSORS)
        assert all(same(checkpoint.tensor(name), tensor) for name, tensor in TENSORS.items())


def test_pickled_shards_with_and_without_an_index(directory: Path) -> None:
    pickled(directory, {"x": torch.ones(1)}, "pytorch_model-00001-of-00002.bin")
    pickled(directory, {"y": torch.zeros(2)}, "pytorch_model-00002-of-00002.bin")
    (directory / "training_args.bin").write_bytes(b"not weights")
    assert Checkpoint.open(directory, allow_pickle=True).names() == ["x", "y"]
    index = {"weight_map": {"y": "pytorch_model-00002-of-00002.bin"}}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert Checkpoint.open(directory, allow_pickle=True).names() == ["y"]


def test_safetensors_come_before_pickles(directory: Path) -> None:
    torch.save({"x": torch.ones(1)}, directory / "pytorch_model.bin")
    assert Checkpoint.open(directory, allow_pickle=True).names() == sorted(TENSORS)


def test_a_pickle_runs_no_code(directory: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    pickled(directory, {"x": Exploit(witness)})
    assert "can run code" in refusal(lambda: Checkpoint.open(directory, allow_pickle=True))
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(witness)))
    assert str(directory) in refusal(lambda: Checkpoint.open(directory, allow_pickle=True))
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but no archive", b"garbage", b"\x80\x02}q\x00."])
def test_corrupt_pickles_are_one_line(directory: Path, content: bytes) -> None:
    pickled(directory, {})
    (directory / "pytorch_model.bin").write_bytes(content)
    assert str(directory) in refusal(lambda: Checkpoint.open(directory, allow_pickle=True))


@pytest.mark.parametrize("value", [[torch.ones(1)], {"x": 3}, {3: torch.ones(1)}, {"x": torch.ones(2).to_sparse()}])
def test_pickles_of_other_things_are_refused(directory: Path, value: object) -> None:
    pickled(directory, value)
    assert str(directory) in refusal(lambda: Checkpoint.open(directory, allow_pickle=True))
