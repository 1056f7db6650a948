"""One row of `export.frontier`: a bundle exported and questioned in a process of its own, and kept to be timed."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from calibration.samples import zoo_samples
from calibration.source import Calibration
from export.accuracy import ask, shares
from export.alone import alone
from export.calibrate import CalibrateOptions, calibrate
from export.doctor import LIBRARIES
from export.frontier_goals import Row
from export.frontier_times import SPEED, side_by_side
from export.pipeline import ExportOptions, export
from export.stages import Progress, silent, to_stderr
from graphs.errors import GateError, UserError
from graphs.model import Request, locate
from quant.recipe import recipe
from runtimes.manifest import VECTORS, Bundle
from runtimes.session import Session

REQUEST = Request("mobilevlm", checkpoint="zoo:mobilevlm-nano")
SEED = 0  # of the questions
TIMED = ("onnxruntime", "executorch")  # what runs here is what a user runs


@dataclass(frozen=True)
class Cell:
    """What a row is of; `passes` in canonical text."""

    passes: str
    recipe: str
    target: str

    def __str__(self) -> str:
        return f"{self.target}, {self.recipe}, {self.passes or 'no pass'}"


@dataclass(frozen=True)
class Setting:
    """What all rows of a run share; with the cell it decides what a row measures."""

    count: int
    seed: int = SEED
    weights: str = ""  # sha256 of the checkpoint's files

    @classmethod
    def here(cls, count: int) -> Setting:
        """With the weights as they lie on disk."""
        assert REQUEST.checkpoint is not None
        digest = hashlib.sha256()
        for path in sorted(locate(REQUEST.checkpoint).iterdir()):
            if path.suffix in (".safetensors", ".json"):
                digest.update(path.name.encode() + path.read_bytes())
        return cls(count, SEED, digest.hexdigest()[:16])

    def identity(self, cell: Cell) -> Row:
        """Tells whether a stored row is of the same inputs: besides the cell, the recipe's contents and the runtime."""
        rules = hashlib.sha256(repr(recipe(cell.recipe)).encode()).hexdigest()[:16]
        return {**asdict(cell), **asdict(self), "rules": rules, "version": version(LIBRARIES[cell.target][1])}


def is_timed(target: str) -> bool:
    """Whether times mean anything here: of Core ML those by the system, none by our reference evaluator."""
    return target in TIMED or sys.platform == "darwin"


def make(cell: Cell, calibration: Calibration, out: Path) -> None:
    """Export a cell's bundle, in place of any that is there."""
    export(ExportOptions(REQUEST, cell.target, cell.recipe, calibration, cell.passes, out, force=True), silent)


def measure(cell: Cell, setting: Setting, calibration: Calibration, out: Path) -> Row:
    """Export and question one bundle. `status` is measured, refused (and why) or failed (and why)."""
    try:
        make(cell, calibration, out)
        session = Session.open(bundle := Bundle.open(out))
    except UserError as refusal:
        return {"status": "refused", "why": str(refusal)}
    except GateError as failure:
        return {"status": "failed", "why": str(failure)}
    samples = list(zoo_samples(setting.count, setting.seed, "heldout"))
    correct = ask(session, samples)
    manifest = bundle.manifest
    return {
        "status": "measured",
        "runtime": session.runtime.version,
        "tokens": manifest["tokens"]["after"],
        "bytes": sum(record["bytes"] for name, record in manifest["files"].items() if name != VECTORS),
        "accuracy": shares(correct, [sample.task for sample in samples]),
        "correct": "".join("01"[right] for right in correct),
        **dict.fromkeys(SPEED),
        "lower": {name: entry["lower"]["relative_l2"] for name, entry in manifest["verification"].items()},
        "schemes": manifest["quantization"]["schemes"],
    }


def collect(passes: str, out: Path) -> None:
    """Statistics as an export would collect them, into a file that all recipes with these passes share."""
    calibrate(CalibrateOptions(REQUEST, out, compress=passes), silent)


@dataclass
class Measurer:
    """Measures cells, each in a process of its own; statistics are collected once for each text of passes."""

    setting: Setting
    scratch: Path
    collected: dict[str, Path] = field(default_factory=dict)

    def __call__(self, cell: Cell) -> Row:
        try:
            row = alone(measure, cell, self.setting, self.calibration(cell), self.place(cell))
            if Setting.here(self.setting.count) != self.setting:
                return {"status": "failed", "why": "the checkpoint changed during the run: start anew"}
            return row
        except Exception as error:  # a row that crashes its process must not end a run of an hour
            return {"status": "failed", "why": f"{type(error).__name__}: {error}"}

    def place(self, cell: Cell) -> Path:
        """Where a cell's bundle lies: one with other inputs lies elsewhere."""
        name = hashlib.sha256(repr(self.setting.identity(cell)).encode()).hexdigest()[:16]
        return self.scratch / f"bundle-{name}"

    def calibration(self, cell: Cell) -> Calibration:
        """Statistics for a cell's recipe, where it asks for any."""
        if not recipe(cell.recipe).layers:
            return Calibration()
        if cell.passes not in self.collected:
            out = self.scratch / f"statistics-{len(self.collected)}.safetensors"
            alone(collect, cell.passes, out)
            self.collected[cell.passes] = out
        return Calibration(str(self.collected[cell.passes]))

    def time(self, rows: Sequence[Row], progress: Progress) -> None:
        """Put latencies into the rows that have any, of bundles side by side; those not there are made again."""
        timed = [row for row in rows if row["status"] == "measured" and is_timed(row["target"])]
        cells = [Cell(row["passes"], row["recipe"], row["target"]) for row in timed]
        absent = [cell for cell in cells if not self.place(cell).is_dir()]
        for number, cell in enumerate(absent, 1):
            progress(f"making the bundle of an earlier run again, {number} of {len(absent)}: {cell}")
            alone(make, cell, self.calibration(cell), self.place(cell))
        if timed:
            times = alone(side_by_side, [self.place(cell) for cell in cells], to_stderr)
            for row, found in zip(timed, times, strict=True):
                row.update(found)
