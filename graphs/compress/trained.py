"""Trained weights of a pass, read from a safetensors file that the user names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from graphs.errors import UserError
from graphs.files import shown
from graphs.safetensors_io import SafetensorsFile


def trained(path: str, expected: Mapping[str, Sequence[int]], under: str = "") -> dict[str, Tensor]:
    """The tensors `expected` (name to shape) in float32, under their names there.

    `under`: a part of names; then a tensor goes by what follows it, and tensors without it are somebody else's.
    Raises UserError, one line that names the file and every tensor that is missing, unknown, of another shape, or not
    of finite numbers.
    """
    file = SafetensorsFile(Path(path).expanduser())
    keys = {key.partition(under)[2] if under else key: key for key in file.entries if under in key}
    faults = [f"no '{under}{name}'" for name in expected if name not in keys]
    faults += [f"'{shown(keys[name])}' is unknown" for name in keys if name not in expected]
    faults += [
        f"'{shown(keys[name])}' is {list(file.entries[keys[name]].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in keys and list(file.entries[keys[name]].shape) != list(shape)
    ]
    refuse(path, faults)
    values = {name: file.tensor(keys[name]).float().clone() for name in expected}
    refuse(
        path,
        [f"'{shown(keys[name])}' holds NaN or Inf" for name, value in values.items() if not value.isfinite().all()],
    )
    return values


def refuse(path: str, faults: Iterable[str], limit: int = 4) -> None:
    """Raise UserError where there are faults."""
    found = [*faults]
    if found:
        more = f" and {len(found) - limit} more" if len(found) > limit else ""
        raise UserError(f"{shown(path)}: the weights do not fit the pass: {', '.join(found[:limit])}{more}")
