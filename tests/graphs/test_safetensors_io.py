"""The safetensors format: equal to the reference library on honest files, one line on hostile ones."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from graphs.errors import UserError
from graphs.safetensors_io import (
    DTYPES,
    SafetensorsFile,
    growing_safetensors,
    read_header,
    tensor_digest,
    write_safetensors,
)

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "c.scale": torch.tensor(2.5, dtype=torch.float16),
    "d.empty": torch.empty(0, 7),
    "e.mask": torch.tensor([True, False, True]),
    "f.ids": torch.tensor([[1 << 40]]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A whole file, written by the reference library."""
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def refusal(act: Callable[[], object]) -> str:
    """The message of the UserError that `act` must end in; every one is a single line."""
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


def test_every_dtype_makes_the_round_trip(tmp_path: Path) -> None:
    raw = torch.arange(16, dtype=torch.uint8)
    tensors = {n: raw.view(torch.bool if d == torch.bool else d) for n, d in DTYPES.items() if d != torch.bool}
    tensors["BOOL"] = torch.tensor([True, False])
    write_safetensors(tmp_path / "all.safetensors", tensors)
    reference = safetensors.torch.load_file(tmp_path / "all.safetensors")
    header = read_header(tmp_path / "all.safetensors")
    assert reference.keys() == header.keys() == DTYPES.keys()
    for name, tensor in tensors.items():
        assert header[name].dtype == tensor.dtype
        assert torch.equal(reference[name].view(torch.uint8), tensor.view(torch.uint8))


def test_an_unaligned_header_reads_the_same(tmp_path: Path) -> None:
    values = torch.randn(5)
    text = b'{"x":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}'
    assert (8 + len(text)) % 4
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + values.numpy().tobytes())
    assert torch.equal(SafetensorsFile(tmp_path / "model.safetensors").tensor("x"), values)


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """A sparse file of 64 GB, larger than this machine's memory, opens and gives one small tensor."""
    big = 64 << 30
    header = {
        "big": {"dtype": "F32", "shape": [big // 4], "data_offsets": [0, big]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [big, big + 8]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(8 + len(text) + big)
        file.write(struct.pack("<ff", 1.5, -2.0))
    opened = SafetensorsFile(tmp_path / "model.safetensors")
    assert opened.tensor("small").tolist() == [1.5, -2.0]
    assert opened.tensor("big")[-1] == 0.0


# ---- hostile files


def lying(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: object, offsets: object, dtype: object = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


PAIR = b"\0" * 8
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x01\0\0", "not a safetensors file"),
    "text": (b"these are not the weights you are looking for", "not a safetensors file"),
    "zip": (b"PK\x03\x04" + b"\0" * 100, "not a safetensors file"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "header longer than the file": (lying({"x": entry([2], [0, 8])}, PAIR, 1 << 20), "claims 1048576 bytes"),
    "header of 2^63": (lying({"x": entry([2], [0, 8])}, PAIR, 1 << 63), "claims 9223372036854775808 bytes"),
    "not JSON": (lying(b"{nope}", PAIR), "not valid JSON"),
    "not UTF-8": (lying(b'{"\xff": 1}', PAIR), "not valid JSON"),
    "JSON list": (lying(b"[1, 2]  ", PAIR), "not a JSON object"),
    "deep JSON": (lying(b'{"a":' * 100_000), "not valid JSON"),
    "name twice": (lying(b'{"x":1, "x":2}'), "a name appears twice"),
    "entry not an object": (lying({"x": 3}), "lacks dtype, shape or data_offsets"),
    "keys missing": (lying({"x": {"dtype": "F32"}}), "lacks dtype, shape or data_offsets"),
    "unknown dtype": (lying({"x": entry([2], [0, 8], "Q4")}, PAIR), "has the dtype Q4"),
    "dtype a list": (lying({"x": entry([2], [0, 8], ["F32"])}, PAIR), "has the dtype"),
    "negative dimension": (lying({"x": entry([-2], [0, 8])}, PAIR), r"impossible shape [-2]"),
    "fractional dimension": (lying({"x": entry([2.0], [0, 8])}, PAIR), "impossible shape"),
    "boolean dimension": (lying({"x": entry([True, 2], [0, 8])}, PAIR), "impossible shape"),
    "absurd shape": (lying({"x": entry([0, 1 << 40, 1 << 40], [0, 0])}), "impossible shape"),
    "absurd rank": (lying({"x": entry([1] * 1000, [0, 4])}, b"\0" * 4), "impossible shape"),
    "offsets reversed": (lying({"x": entry([2], [8, 0])}, PAIR), "impossible data_offsets"),
    "offsets negative": (lying({"x": entry([2], [-8, 0])}, PAIR), "impossible data_offsets"),
    "three offsets": (lying({"x": entry([2], [0, 4, 8])}, PAIR), "impossible data_offsets"),
    "too few bytes": (lying({"x": entry([3], [0, 8])}, PAIR), "needs 12 bytes and is given 8"),
    "beyond the file": (lying({"x": entry([4], [0, 16])}, PAIR), "truncated, tensor 'x' ends at byte"),
    "overlap": (lying({"x": entry([2], [0, 8]), "y": entry([1], [4, 8])}, PAIR), "'y' overlaps"),
    "same bytes": (lying({"x": entry([2], [0, 8]), "y": entry([2], [0, 8])}, PAIR), "'y' overlaps"),
    "hole": (lying({"x": entry([1], [4, 8])}, PAIR), "leaves a hole"),
    "bytes left over": (lying({"x": entry([1], [0, 4])}, PAIR), "4 bytes follow the last tensor"),
    "name with newlines": (lying({"x\ny\x1b[2J": entry([-1], [0, 8])}, PAIR), r"'x\ny\x1b[2J'"),
    "endless name": (lying({"x" * 100_000: entry([-1], [0, 8])}, PAIR), "impossible shape"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights_are_one_line_naming_the_file(path: Path, kind: str) -> None:
    content, cause = HOSTILE[kind]
    path.write_bytes(content)
    message = refusal(lambda: SafetensorsFile(path))
    assert cause in message
    assert str(path) in message


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.9, 0.999])
def test_truncation_anywhere_is_refused(path: Path, kept: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert str(path) in refusal(lambda: SafetensorsFile(path))


def test_bit_flips_in_the_header_never_escape_as_other_errors(path: Path) -> None:
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        position = int(torch.randint(8 + int.from_bytes(whole[:8], "little"), (), generator=generator))
        flip = 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :])
        try:
            opened = SafetensorsFile(path)
            assert sum(opened.tensor(name).nbytes for name in opened.entries) <= len(whole)
        except UserError as error:
            refused += "\n" not in str(error)
    assert refused > 100


# ---- writing


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    class Breaks(dict[str, torch.Tensor]):
        reads = 0

        def __getitem__(self, name: str) -> torch.Tensor:
            self.reads += 1
            if self.reads > len(self) + 1:
                raise UserError("the source went away")
            return super().__getitem__(name)

    with pytest.raises(UserError, match="went away"):
        write_safetensors(tmp_path / "model.safetensors", Breaks(x=torch.ones(4), y=torch.ones(4)), max_shard_bytes=16)
    assert list(tmp_path.iterdir()) == []
    assert "cannot be written" in refusal(lambda: write_safetensors(tmp_path / "no" / "m.safetensors", TENSORS))


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the same failed write, with another errno."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = refusal(lambda: write_safetensors(tmp_path / "model.safetensors", {"x": torch.ones(100_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written: File too large" in message
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_grew_reads_as_any_other(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(5), "none": torch.empty(0, 4)}
    with growing_safetensors(tmp_path / "grown", 1001) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        with pytest.raises(ValueError, match="'a' was written before"):
            writer.add("a", torch.ones(5))
        assert not (tmp_path / "grown").exists()
        writer.metadata = {"said": "last"}
    loaded = safetensors.torch.load_file(tmp_path / "grown")
    file = SafetensorsFile(tmp_path / "grown")
    assert loaded.keys() == file.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(file.tensor(name), tensor)
        assert file.digest(name) == tensor_digest(tensor)
    with safetensors.safe_open(tmp_path / "grown", "pt") as opened:
        assert opened.metadata()["said"] == "last"


def test_a_header_without_room_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="does not fit into 64"),
        growing_safetensors(tmp_path / "grown", 64) as writer,
    ):
        writer.add("a", torch.ones(5))
    assert not list(tmp_path.iterdir())
