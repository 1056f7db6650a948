"""Trains mobilevlm-nano on pictures made on the fly: `python -m zoo.train --out zoo/mobilevlm-nano`.

Two processes of one thread each share every batch, which on two cores is faster than one process of two threads and
suffers less from other work. The state is saved every few minutes; the same command goes on from it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from zoo.layout import architecture, write
from zoo.nano import Nano, Student
from zoo.packing import Batch, Encoder, drill, pack, shortening, thin
from zoo.questions import TASKS
from zoo.scenes import samples, scene
from zoo.tokens import train_tokenizer

VALIDATION_SEED = 1_000_001
VALIDATION_COUNT = 105
SAVE_EVERY = 200
REPORT_EVERY = 25


#: (step, share of the peak learning rate); two knots a step apart make a jump
RATES = (
    (0, 0.0),
    (100, 1.0),
    (1600, 1.0),
    (1601, 0.35),
    (3741, 0.35),
    (4200, 0.107),
    (4201, 0.35),
    (5200, 0.35),
    (5600, 0.0),
    (5601, 0.35),
    (6600, 0.35),
    (7000, 0.0),
    (7001, 0.35),
    (7800, 0.35),
    (8200, 0.0),
)


@dataclass(frozen=True)
class Plan:
    """All that decides the weights, besides the code and the machine's arithmetic.

    `batch` counts pictures, `questions` the most that are asked of one; `rates` are shares of `muon_rate` and
    `adam_rate`; `auxiliary` weighs the losses of the patch and token heads. What the answers alone teach too slowly is
    taught from a step on: from `settle`, the visual tokens are labelled as the patches are, at a lower rate (reading is
    learned before, shapes are weak in the tokens until then); from `place`, also by where they are; from `drill`, a
    picture gets `drilled` questions, most of them about one of its shapes, because only several to one picture teach
    which shape a question means; from `locate`, those on position come first. From `shorten`, every other batch reads
    fewer visual tokens than there are, and the class token is taught what is in the picture, so that compression finds
    a decoder that can do with less, and attention that means something; from `lengthen`, every fifth.
    """

    steps: int = 8200
    batch: int = 32
    questions: int = 4
    processes: int = 2
    seed: int = 0
    muon_rate: float = 3e-3
    adam_rate: float = 2e-3
    weight_decay: float = 0.05
    rates: tuple[tuple[int, float], ...] = RATES
    settle: int = 1600
    shorten: int = 2400
    place: int = 2800
    drill: int = 3200
    drilled: int = 8
    locate: int = 4200
    lengthen: int = 7000
    auxiliary: float = 0.4

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at that step, between the knots of `rates`."""
        steps, shares = ([knot[n] for knot in self.rates] for n in (0, 1))
        return float(np.interp(step + 1, steps, shares))


@dataclass
class Progress:
    """Steps done and seconds spent over all runs that led here, and the steps at which a run went on from a state."""

    step: int = 0
    seconds: float = 0.0
    resumed_at: tuple[int, ...] = ()


class Batches(Dataset[Batch]):
    """One process's half of batch n: every other of the scenes from n * batch on. There is no state to remember."""

    def __init__(self, plan: Plan, encoder: Encoder, patch: int, rank: int) -> None:
        self.plan, self.encoder, self.patch, self.rank = plan, encoder, patch, rank

    def __getitem__(self, step: int) -> Batch:
        first = step * self.plan.batch
        numbers = range(first + self.rank, first + self.plan.batch, self.plan.processes)
        rng = np.random.default_rng([self.plan.seed, step, self.rank])
        scenes = [scene("train", self.plan.seed, n) for n in numbers]
        if step >= self.plan.drill:
            preferred = "position" if step >= self.plan.locate else ""
            scenes = [drill(made, self.plan.drilled, rng, preferred) for made in scenes]
        else:
            scenes = [thin(made, self.plan.questions, rng) for made in scenes]
        batch = pack(scenes, self.encoder, self.patch)
        if step < self.plan.shorten:
            return batch
        return replace(batch, shortening=shortening(batch, rng, 0.5 if step < self.plan.lengthen else 0.2))


def batches(data: Batches, start: int) -> Iterator[Batch]:
    """Batches from number `start` to the last, made in another process while the model trains."""
    steps = range(start, data.plan.steps)
    return iter(DataLoader(data, batch_size=None, sampler=steps, num_workers=1, prefetch_factor=8))


def optimizers(student: Student, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) for matrices in blocks, AdamW for the rest."""
    named = list(student.named_parameters())
    inside = {name for name, p in named if p.ndim == 2 and (".layers." in name or ".projector.mlp" in name)}
    matrices = [p for name, p in named if name in inside]
    tables = [p for name, p in named if name not in inside and p.ndim > 1]
    vectors = [p for name, p in named if p.ndim <= 1]
    decay = plan.weight_decay
    return [
        torch.optim.Muon(matrices, lr=plan.muon_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=plan.adam_rate,
            betas=(0.9, 0.98),
        ),
    ]


def average_gradients(module: nn.Module, processes: int) -> None:
    """Replaces every gradient by its mean over the processes, in one message."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= processes
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def validate(nano: Nano, encoder: Encoder) -> str:
    """Exact match by task on training-split scenes of another seed, as text: the held-out split stays unseen."""
    right: dict[str, list[bool]] = defaultdict(list)
    rows = sorted(samples("train", VALIDATION_COUNT, VALIDATION_SEED), key=lambda sample: TASKS.index(sample.task))
    with torch.autocast("cpu", torch.bfloat16):
        found = nano.answers([sample.image for sample in rows], [sample.question for sample in rows], encoder)
    for sample, answer in zip(rows, found, strict=True):
        right[sample.task].append(answer == sample.answer)
    shares = {task: sum(right[task]) / len(right[task]) for task in TASKS}
    return f"exact match {sum(shares.values()) / len(shares):.3f}: " + " ".join(
        f"{k} {v:.2f}" for k, v in shares.items()
    )


class Trainer:
    """One process's part of the training; that of rank 0 also reports, validates and saves."""

    def __init__(self, plan: Plan, state: Path, rank: int) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.state, self.rank = plan, state, rank
        self.encoder = Encoder(train_tokenizer())
        self.model = architecture(self.encoder.tokenizer)
        self.student = Student(self.model)
        self.optimizers = optimizers(self.student, plan)
        self.progress = Progress()
        if state.exists():
            self._resume()

    def run(self, minutes: float) -> None:
        """Trains to the end of the plan, or for `minutes`."""
        plan, before = self.plan, torch.tensor(self.encoder.before)
        tick = time.monotonic()
        began, stop = tick - self.progress.seconds, tick + 60 * minutes
        means: dict[str, float] = {}
        data = Batches(plan, self.encoder, self.model.vision.patch_size, self.rank)
        for step, batch in enumerate(batches(data, self.progress.step), self.progress.step):
            losses = self._step(step, batch, before)
            means = {k: v if k not in means else 0.95 * means[k] + 0.05 * v for k, v in losses.items()}
            self.progress = replace(self.progress, step=step + 1, seconds=time.monotonic() - began)
            last = step + 1 == plan.steps or self._agree(time.monotonic() > stop)
            if self.rank:
                if last:
                    break
                continue
            if (step + 1) % REPORT_EVERY == 0:
                now = time.monotonic()
                speed, tick = REPORT_EVERY / (now - tick), now
                text = " ".join(f"{k} {v:.3f}" for k, v in means.items())
                left = (plan.steps - step - 1) / speed / 60
                print(f"step {step + 1}: {text}; {speed * plan.batch:.1f} images/s, {left:.1f} min left", flush=True)
            if last or (step + 1) % SAVE_EVERY == 0:
                self._save()
                print(f"step {step + 1}: {validate(self.student.nano, self.encoder)}", flush=True)
            if last:
                break

    def _step(self, step: int, batch: Batch, before: torch.Tensor) -> dict[str, float]:
        for optimizer, peak in zip(self.optimizers, (self.plan.muon_rate, self.plan.adam_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * self.plan.rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            plan = self.plan
            losses = self.student.losses(batch, before, *(step >= n for n in (plan.settle, plan.place, plan.shorten)))
        total = losses["answer"] + self.plan.auxiliary * sum(
            (0.5 if "colors" in name else 1.0) * loss for name, loss in losses.items() if name != "answer"
        )
        total.backward()
        average_gradients(self.student, self.plan.processes)
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {name: loss.item() for name, loss in losses.items()}

    def _agree(self, mine: bool) -> bool:
        """Whether any process says so: their clocks differ, and all must stop at the same step."""
        said = torch.tensor(float(mine))
        dist.all_reduce(said)
        return bool(said.item())

    def _save(self) -> None:
        """Writes the state, whole or not at all. Data and dropout-free steps depend on the step's number alone."""
        self.state.parent.mkdir(parents=True, exist_ok=True)
        part = self.state.with_suffix(".part")
        saved = {
            "parameters": {name: p.detach() for name, p in self.student.named_parameters()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            **asdict(self.progress),
        }
        torch.save(saved, part)
        part.replace(self.state)

    def _resume(self) -> None:
        saved = torch.load(self.state, weights_only=True)
        self.student.load_state_dict(saved["parameters"], strict=False)
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.progress = Progress(saved["step"], saved["seconds"], (*saved["resumed_at"], saved["step"]))


def work(rank: int, plan: Plan, options: argparse.Namespace, rendezvous: str) -> None:
    """The body of one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=plan.processes)
    trainer = Trainer(plan, options.state, rank)
    if rank == 0:
        count = sum(p.numel() for p in trainer.student.nano.root.parameters())
        print(f"{count} parameters, from step {trainer.progress.step} of {plan.steps}: {plan}", flush=True)
    with sdpa_kernel(SDPBackend.MATH):  # faster backwards than the fused kernel at this size
        trainer.run(options.minutes)
    if rank == 0 and trainer.progress.step < plan.steps:
        print(
            f"stopped at step {trainer.progress.step} of {plan.steps}; the same command goes on from there", flush=True
        )
    elif rank == 0:
        facts = {
            "plan": asdict(plan),
            "steps": trainer.progress.step,
            "pictures": trainer.progress.step * plan.batch,
            "minutes": round(trainer.progress.seconds / 60, 1),
            "resumed_at": trainer.progress.resumed_at,
            "torch": torch.__version__,
        }
        write(options.out, trainer.encoder.tokenizer, trainer.student.nano.root, facts)
        print(f"wrote {options.out}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("zoo/mobilevlm-nano"), help="directory of the checkpoint")
    parser.add_argument("--state", type=Path, default=Path("build/zoo/training.pt"), help="where to save and resume")
    parser.add_argument("--restart", action="store_true", help="ignore a saved state")
    parser.add_argument("--minutes", type=float, default=180.0, help="stop then, saved, whatever the step")
    options = parser.parse_args()
    if options.restart:
        options.state.unlink(missing_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the loader's fork
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan()
        spawn(work, (plan, options, str(Path(folder) / "rendezvous")), plan.processes)


if __name__ == "__main__":
    main()
