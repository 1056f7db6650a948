from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from zoo import train
from zoo.train import Batches, Plan, Trainer


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, one tokenizer for all runs, and a validation that takes no time."""
    monkeypatch.setattr(train, "VALIDATION_COUNT", 7)
    monkeypatch.setattr(train, "train_tokenizer", cache(train.train_tokenizer))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("alone")
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def run(steps: int, state: Path) -> Trainer:
        plan = Plan(steps=steps, batch=4, processes=1, settle=1, shorten=1, place=2, drill=2, locate=3)
        trainer = Trainer(plan, state, rank=0)
        trainer.run(minutes=5)
        assert trainer.progress.step == steps
        return trainer

    whole = run(4, tmp_path / "whole.pt")
    run(2, tmp_path / "parts.pt")
    parts = run(4, tmp_path / "parts.pt")
    assert parts.progress.resumed_at == (2,)
    start = Trainer(whole.plan, tmp_path / "none.pt", rank=0)
    for (name, one), two, first in zip(
        whole.student.named_parameters(), parts.student.parameters(), start.student.parameters(), strict=True
    ):
        assert torch.equal(one, two), name
        assert not torch.equal(one, first), name  # every parameter learns


def test_processes_share_a_batch_without_overlap() -> None:
    plan = Plan(batch=6, processes=2)
    encoder = train.Encoder(train.train_tokenizer())
    halves = [Batches(plan, encoder, 8, rank)[1].pixels for rank in (0, 1)]
    whole = Batches(Plan(batch=6, processes=1), encoder, 8, 0)[1].pixels
    assert torch.equal(torch.stack(halves, dim=1).flatten(0, 1), whole)


def test_rates_rise_hold_and_end_at_zero() -> None:
    plan = Plan()
    rates = [plan.rate(step) for step in range(plan.steps)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[800] == 1.0
    assert rates[plan.settle] == pytest.approx(0.35)
    assert rates[-1] == 0.0
    assert all(0 <= rate <= 1 for rate in rates)
