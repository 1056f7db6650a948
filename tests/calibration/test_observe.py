"""The observer on a small module, where every number can be counted by hand."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from calibration import sweep
from calibration.moments import LayerStatistics
from calibration.observe import Hessian, Observer, Reservoir, rows_of
from calibration.sweep import Call, Labels
from graphs.errors import UserError
from graphs.program import Program, Signature, TracedMethod
from graphs.spec import TensorSpec
from graphs.trace import trace_module


class Small(nn.Module):
    """`a` and `b` read the same value, `a` a second one besides; `c` reads what `b` gives; `d` convolves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b2, self.c = nn.Linear(3, 5), nn.Linear(3, 2)
        self.d = nn.Conv1d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.a(x)
        twice = self.a(F.relu(once))
        return self.c(self.b(x) + twice) + self.b2(x).sum() + self.d(x).sum()


def observed(labels: Labels, x: Tensor, scale: float = 1.0) -> tuple[Small, Tensor, dict[str, LayerStatistics]]:
    """The module, what the observer says that it gives, and what it has counted."""
    real = Small()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = Small().requires_grad_(False)
    inputs = (TensorSpec("x", (1, 4, 3)),)
    exported = trace_module(fake, inputs, mode)
    weights = {name: scale * value.detach() for name, value in real.state_dict().items()}
    method = TracedMethod(Signature(inputs, (TensorSpec("y", (1, 4, 2)),)), exported, {name: name for name in weights})
    program = Program({"only": method}, weights, {})
    observer = Observer(program, "only", hessians=re.compile("b2"), rows=3, outputs=2, seed=0)
    found: dict[str, LayerStatistics] = {}
    (((result,),),) = observer.run([[Call((x,), labels)]], found.update)
    return real, result, found


@pytest.mark.parametrize("limit", [1, sweep.LEAST_BYTES])
def test_sharing_and_weights_applied_twice(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether each weight is a stretch of its own, or all are one."""
    monkeypatch.setattr(sweep, "LEAST_BYTES", limit)
    monkeypatch.setattr(sweep, "MOST_BYTES", limit)
    x = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1))
    labels = {"image": torch.tensor([1, 2]), "text": torch.tensor([0, 3])}
    real, result, found = observed(labels, x)
    torch.testing.assert_close(result, real(x).detach())
    assert set(found) == {"a.weight", "b.weight", "b2.weight", "c.weight", "d.weight"}
    assert found["b.weight"].inputs is found["b2.weight"].inputs
    assert found["a.weight"].inputs is not found["b.weight"].inputs
    with torch.no_grad():
        both = torch.cat([x[0], F.relu(real.a(x))[0]])
    image = torch.tensor([1, 2, 5, 6])
    moments = found["a.weight"].inputs["image"]
    assert moments.count == 4
    torch.testing.assert_close(moments.sum_square, both[image].square().sum(0))
    torch.testing.assert_close(moments.minimum, both[image].amin(0))
    assert found["b.weight"].inputs["text"].count == 2
    hessian = found["b.weight"].inputs["text"].hessian  # asked for by b2, which shares it
    torch.testing.assert_close(hessian, x[0, [0, 3]].T @ x[0, [0, 3]])
    assert found["c.weight"].inputs["text"].hessian is None


def test_channels_of_a_convolution() -> None:
    _, _, found = observed({"image": torch.arange(4)}, torch.arange(12.0).reshape(1, 4, 3))
    layer = found["d.weight"]
    assert layer.inputs["image"].count == 3
    assert layer.inputs["image"].maximum.tolist() == [2.0, 5.0, 8.0, 11.0]
    assert layer.outputs.minimum.shape == (6,)


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match=r"only: .* NaN or Inf"):
        observed({"text": torch.arange(4)}, torch.ones(1, 4, 3), scale=float("nan"))


def test_rows_after_image_positions_were_dropped() -> None:
    labels = {"image": torch.arange(2, 8), "text": torch.tensor([0, 1, 8, 9])}
    assert rows_of(labels, 10) is labels
    kept = rows_of(labels, 7)
    assert {name: rows.tolist() for name, rows in kept.items()} == {"image": [2, 3, 4], "text": [0, 1, 5, 6]}
    assert {name: rows.tolist() for name, rows in rows_of(labels, 4).items()} == {"image": [], "text": [0, 1, 2, 3]}
    assert rows_of({"image": torch.arange(1)}, 3)["image"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="sees 11 rows"):
        rows_of(labels, 11)


def test_rows_of_the_last_positions_alone() -> None:
    labels = {"image": torch.arange(2, 8), "text": torch.tensor([0, 1, 8, 9])}
    assert {name: rows.tolist() for name, rows in rows_of(labels, 3).items()} == {"image": [0], "text": [1, 2]}
    assert {name: rows.tolist() for name, rows in rows_of(labels, 1).items()} == {"image": [], "text": [0]}


@pytest.mark.parametrize("width", [3, 2500])
def test_second_moments_are_whole(width: int) -> None:
    rows = torch.randn(1500, width, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(width)
    for some in rows.split([1000, 30, 470]):
        hessian.add(some)
    found, expected = hessian.whole(), rows.T.double() @ rows.double()
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert torch.equal(found, found.T)


def test_a_reservoir_is_a_uniform_sample() -> None:
    times = torch.zeros(20)
    for seed in range(400):
        reservoir = Reservoir(5, seed, "x")
        for piece in torch.arange(20.0)[:, None].split([1, 12, 3, 4]):
            reservoir.add(piece)
        kept = reservoir.rows[:, 0].long()
        assert len(kept.unique()) == 5
        times[kept] += 1
    assert times.sum() == 2000
    assert (times - 100).abs().max() < 40  # standard deviation 8.7
