"""Checkpoints in the public Hugging Face layout: a directory of config.json and weights, local or from the hub."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from graphs.errors import UserError
from graphs.files import contained, listing, read_json, reason, shown
from graphs.safetensors_io import Entry, SafetensorsFile, tensor_digest

CONFIG = "config.json"
FLAG = "--allow-pickle"


class WeightFile(Protocol):
    """One file of tensors: their dtypes and shapes at once, their values on demand."""

    path: Path
    entries: Mapping[str, Entry]

    def tensor(self, name: str) -> torch.Tensor: ...
    def release(self, name: str) -> None: ...
    def digest(self, name: str) -> str: ...
    def close(self) -> None: ...


class PickledFile:
    """A legacy `pytorch_model.bin`, read with `weights_only=True` (no code from the file runs) and memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Raises: UserError where the file is not a pickled dictionary of dense tensors."""
        self.path = path
        try:
            with path.open("rb") as file:
                zipped = file.read(2) == b"PK"  # torch's format before 1.6 is no archive and cannot be mapped
            loaded = torch.load(path, weights_only=True, mmap=zipped, map_location="cpu")
        except OSError as error:
            raise UserError(f"{path}: {reason(error)}") from error
        except (RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: not a file of pickled tensors: {reason(error)}") from error
        except pickle.UnpicklingError as error:
            raise UserError(f"{path}: holds more than tensors, and such a file can run code; refused") from error
        if not isinstance(loaded, dict):
            raise UserError(f"{path}: a pickled {type(loaded).__name__}, not a dictionary of tensors")
        self._tensors: dict[str, torch.Tensor] = {}
        for name, tensor in loaded.items():
            dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
            if not isinstance(name, str) or not dense or tensor.is_quantized:
                raise UserError(f"{path}: '{shown(name)}' is not a dense tensor under a name")
            self._tensors[name] = tensor.detach()
        self.entries: Mapping[str, Entry] = {
            name: Entry(tensor.dtype, tensor.shape, 0, tensor.nbytes) for name, tensor in self._tensors.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def release(self, name: str) -> None:
        """Nothing: torch owns this map."""

    def digest(self, name: str) -> str:
        return tensor_digest(self._tensors[name])

    def close(self) -> None:
        self._tensors.clear()


class Checkpoint:
    """An opened checkpoint: its configuration and its tensors by name, memory-mapped.

    `config`: config.json. `files`: config.json, the index where there is one, and the weight files, for hashing.
    `allow_nan`: what its user said about NaN and Inf; `graphs.weights.Weights` asks.
    """

    def __init__(self, directory: Path, config: dict[str, Any], files: Iterable[Path], allow_nan: bool) -> None:
        self.directory = directory
        self.config = config
        self.files: tuple[Path, ...] = tuple(files)
        self.allow_nan = allow_nan
        self._shards: dict[str, WeightFile] = {}
        self._stored: dict[str, str] = {}  # name -> name in its file, where they differ

    @classmethod
    def open(cls, path: Path | str, *, allow_pickle: bool = False, allow_nan: bool = False) -> Checkpoint:
        """Open a directory: `model.safetensors`, or what `model.safetensors.index.json` lists, or all `*.safetensors`.

        With `allow_pickle` also `pytorch_model*.bin`, where there are no safetensors. Headers are read and checked
        here, tensors later. Raises: UserError, one line naming the file and the cause.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise UserError(f"{directory}: not a directory with a checkpoint")
        try:
            config_path = contained(directory, CONFIG)
            names, index = _weight_files(directory, allow_pickle)
            paths = [contained(directory, name) for name in names]
        except OSError as error:
            raise UserError(f"{directory}: {reason(error)}") from error
        extra = [] if index is None else [index]
        checkpoint = cls(directory, read_json(config_path), [config_path, *extra, *paths], allow_nan)
        shards: dict[str, WeightFile] = {
            p.name: PickledFile(p) if p.suffix == ".bin" else SafetensorsFile(p) for p in paths
        }
        checkpoint._adopt(shards, {} if index is None else _weight_map(index))
        return checkpoint

    def _adopt(self, shards: Mapping[str, WeightFile], weight_map: Mapping[str, str]) -> None:
        for shard in shards.values():
            for name in shard.entries:
                if name in self._shards:
                    first = self._shards[name].path.name
                    raise UserError(f"{self.directory}: tensor '{shown(name)}' is in {first} and in {shard.path.name}")
                self._shards[name] = shard
        for name, file in weight_map.items():
            if name not in shards[file].entries:
                raise UserError(f"{self.directory}: {file} lacks tensor '{shown(name)}', which the index places there")
        if weight_map:
            self._shards = {name: self._shards[name] for name in weight_map}
        if not self._shards:
            raise UserError(f"{self.directory}: its weight files hold no tensors")

    def rename(self, rules: Iterable[tuple[str, str]]) -> None:
        """Bring names of several public layouts to one: the first regular expression of `rules` that a name begins with
        is exchanged for its replacement.

        Raises: UserError where two tensors come to the same name.
        """
        compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
        shards: dict[str, WeightFile] = {}
        for name, shard in self._shards.items():
            matches = ((found, new) for pattern, new in compiled if (found := pattern.match(name)))
            found, new = next(matches, (None, ""))
            renamed = found.expand(new) + name[found.end() :] if found else name
            if renamed in shards:
                raise UserError(f"{self.directory}: '{shown(name)}' and '{shown(self.stored(renamed))}' are one tensor")
            shards[renamed] = shard
            self._stored[renamed] = name
        self._shards = shards

    def stored(self, name: str) -> str:
        """What a tensor is called in its file."""
        return self._stored.get(name, name)

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._shards)

    def __contains__(self, name: object) -> bool:
        return name in self._shards

    def shape(self, name: str) -> torch.Size:
        return self._shards[name].entries[self.stored(name)].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._shards[name].entries[self.stored(name)].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, a view of the mapped file; treat it as read-only."""
        return self._shards[name].tensor(self.stored(name))

    def release(self, name: str) -> None:
        """Drop a tensor's pages from this process's resident memory; reading it again is allowed."""
        self._shards[name].release(self.stored(name))

    def digest(self, name: str) -> str:
        """Tells a tensor's dtype, shape and bytes apart from others: hexadecimal, 64 digits."""
        return self._shards[name].digest(self.stored(name))

    def close(self) -> None:
        """Let go of the files; tensors handed out stay valid."""
        for shard in set(self._shards.values()):
            shard.close()
        self._shards.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _weight_files(directory: Path, allow_pickle: bool) -> tuple[list[str], Path | None]:
    """The names of the weight files, and the index that lists them where there is one."""
    present = {p.name for p in directory.iterdir()}
    pickled = sorted(name for name in present if re.fullmatch(r"pytorch_model.*\.bin", name))
    layouts = [("model.safetensors", sorted(n for n in present if n.endswith(".safetensors") and n[0] != "."))]
    if allow_pickle:
        layouts.append(("pytorch_model.bin", pickled))
    for single, loose in layouts:
        if single in present:
            return [single], None
        if f"{single}.index.json" in present:
            index = contained(directory, f"{single}.index.json")
            return sorted(set(_weight_map(index).values())), index
        if loose:
            return loose, None
    if pickled:
        raise UserError(
            f"{directory}: has only pickled weights ({_first(pickled)}), which can carry code; "
            f"{FLAG} reads the tensors of one you trust, as data"
        )
    raise UserError(f"{directory}: no *.safetensors there (nor pytorch_model*.bin); it holds {listing(directory)}")


def _first(names: list[str]) -> str:
    return ", ".join(shown(n, 60) for n in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map from tensors to files")
    suffix = ".bin" if index.name.startswith("pytorch_model") else ".safetensors"
    for file in weight_map.values():
        if not isinstance(file, str) or not file.endswith(suffix):
            raise UserError(f"{index}: names '{shown(file)}' as a file of weights; it must end in {suffix}")
    return weight_map
