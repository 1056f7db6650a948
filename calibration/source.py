"""Where an export's calibration statistics come from: a file of them, or data to run the program on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.collect import collect
from calibration.samples import open_samples
from calibration.statistics import Statistics
from graphs.errors import UserError
from graphs.model import Model
from graphs.program import Program

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Calibration:
    """`data`: a file that `vlmx calibrate` wrote, or what `open_samples` takes: then `count` are drawn by `seed`."""

    data: str = "zoo"
    count: int = 64
    seed: int = 0

    @property
    def collected(self) -> int:
        """How many samples the program is run on: none where statistics are read from a file."""
        return 0 if self.data.endswith(SUFFIX) else self.count

    def about(self) -> str:
        """In words, for progress."""
        return self.data if self.data.endswith(SUFFIX) else f"{self.count} samples of {self.data}, seed {self.seed}"

    def statistics(
        self,
        model: Model,
        program: Program,
        passes: str,
        hessians: bool,
        say: Callable[[str], None],
        out: Path | None = None,
    ) -> Statistics:
        """Of `program`, float with its passes applied: read from the file, or collected (in `out`, see `collect`).

        Raises UserError where the data or the file does not fit it.
        """
        if self.data.endswith(SUFFIX):
            return Statistics.load(Path(self.data), program)
        samples = open_samples(self.data, self.count, self.seed)
        return collect(model, program, samples, seed=self.seed, hessians=hessians, passes=passes, out=out, progress=say)


def again(model: Model, program: Program, origin: Mapping[str, Any], hessians: bool) -> Statistics:
    """The statistics that a manifest's `calibration` tells of, collected anew. Raises UserError where it is damaged."""
    try:
        data, count, seed = str(origin["data"]), int(origin["count"]), int(origin["seed"])
        passes, steps = str(origin["passes"]), int(origin["decode_steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the manifest's calibration is damaged: {error!r}") from error
    samples = open_samples(data, count, seed)
    return collect(model, program, samples, seed=seed, decode_steps=steps, hessians=hessians, passes=passes)
