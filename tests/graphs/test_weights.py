"""Weights by parameter name: lazy sources, checks by name, random and live ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from graphs.errors import UserError
from graphs.weights import (
    Checkpoint,
    ModuleWeights,
    Permute,
    RandomWeights,
    Reshape,
    Rows,
    Source,
    Transpose,
    Weights,
    write_safetensors,
)

FUSED = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


def checkpoint(directory: Path, tensors: dict[str, torch.Tensor], allow_nan: bool = False) -> Checkpoint:
    (directory / "config.json").write_text("{}")
    write_safetensors(directory / "model.safetensors", tensors)
    return Checkpoint.open(directory, allow_nan=allow_nan)


def test_sources_split_transpose_permute_reshape_and_join(tmp_path: Path) -> None:
    conv = torch.arange(24.0).view(2, 3, 4)
    opened = checkpoint(tmp_path, {"qkv": FUSED, "conv": conv, "b1": torch.ones(2), "b2": torch.zeros(3)})
    weights = Weights(
        opened,
        {
            "q": Source("qkv", (Rows(0, 4),)),
            "v_t": Source("qkv", (Rows(8, 12), Transpose())),
            "right": Source("qkv", (Rows(2, 4, dim=1),)),
            "heads": Source("qkv", (Reshape((3, 4, 4)), Permute((1, 0, 2)))),
            "conv": Source("conv", (Permute((2, 0, 1)),)),
            "bias": Source(("b1", "b2")),
            "wide": Source(("qkv", "qkv"), dim=1),
        },
    )
    expected = {
        "q": FUSED[:4],
        "v_t": FUSED[8:].T,
        "right": FUSED[:, 2:],
        "heads": FUSED.view(3, 4, 4).permute(1, 0, 2),
        "conv": conv.permute(2, 0, 1),
        "bias": torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]),
        "wide": torch.cat([FUSED, FUSED], 1),
    }
    assert set(weights) == set(expected)
    assert len(weights) == 7
    weights.check({name: tensor.shape for name, tensor in expected.items()})
    for name, tensor in expected.items():
        assert weights.shape(name) == tensor.shape
        assert weights[name].is_contiguous()
        assert torch.equal(weights[name], tensor)


def test_values_come_in_the_wanted_dtype(tmp_path: Path) -> None:
    half = torch.randn(5, 3).to(torch.bfloat16)
    opened = checkpoint(tmp_path, {"x": half, "ids": torch.arange(3)})
    mapping = {"x": Source("x"), "ids": Source("ids")}
    assert torch.equal(Weights(opened, mapping)["x"], half.float())
    assert Weights(opened, mapping, torch.float16)["x"].dtype == torch.float16
    assert torch.equal(Weights(opened, mapping, None)["x"], half)
    assert torch.equal(Weights(opened, mapping)["ids"], torch.arange(3))


def test_a_plain_float32_tensor_is_a_view_of_the_file(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"x": FUSED})
    weights = Weights(opened, {"x": Source("x")})
    assert weights["x"].data_ptr() == opened.tensor("x").data_ptr()
    weights.release("x")
    assert torch.equal(weights["x"], FUSED)


def test_check_lists_faults_by_name(tmp_path: Path) -> None:
    stored = {
        "model.a": torch.ones(2, 3),
        "model.c": torch.ones(3),
        "model.extra": torch.ones(1),
        "old.inv": torch.ones(1),
    }
    weights = Weights(checkpoint(tmp_path, stored), {n: Source(f"model.{n}") for n in ("a", "b", "c")})
    expected = {"a": torch.Size([3, 2]), "b": torch.Size([1]), "c": torch.Size([3]), "d": torch.Size([1])}
    with pytest.raises(UserError) as caught:
        weights.check(expected, ignored=[r"old\..*"])
    assert str(caught.value) == (
        f"{tmp_path}: the weights do not fit the model: 2 missing: d, model.b; 1 unexpected: model.extra; "
        "1 misshapen: model.a [2, 3] instead of [3, 2]"
    )


def test_check_says_which_operation_does_not_fit_and_which_dtype(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"qkv": FUSED, "packed": torch.ones(2, dtype=torch.int8)})
    weights = Weights(
        opened, {"k": Source("qkv", (Rows(8, 16),)), "v": Source("qkv", (Rows(0, 4),)), "w": Source("packed")}
    )
    with pytest.raises(UserError) as caught:
        weights.check({"k": torch.Size([8, 4]), "v": torch.Size([5, 4]), "w": torch.Size([2])})
    message = str(caught.value)
    assert "3 misshapen: qkv [12, 4] (start (8) + length (8) exceeds dimension size (12).)" in message
    assert "qkv [12, 4], as [4, 4], instead of [5, 4]" in message
    assert "packed [2] is of int8, not of floating-point numbers" in message


def test_check_is_bounded_to_one_line(tmp_path: Path) -> None:
    stored = {f"layer.{i:03d}\n": torch.ones(1) for i in range(100)}
    with pytest.raises(UserError, match=r"100 unexpected: layer.000\\n, .* and 92 more$") as caught:
        Weights(checkpoint(tmp_path, stored), {}).check({})
    assert "\n" not in str(caught.value)


def test_check_reads_no_data(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"x": torch.full((4, 4), torch.nan)})
    Weights(opened, {"x": Source("x", (Transpose(),))}).check({"x": torch.Size([4, 4])})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_refused_by_name(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    tensor = torch.ones(100, 3)
    tensor[57, 1] = bad
    mapping = {"w": Source("model.layers.3.w")}
    with pytest.raises(UserError, match=r"tensor 'model.layers.3.w' holds NaN or Inf; --allow-nan"):
        Weights(checkpoint(tmp_path, {"model.layers.3.w": tensor.to(dtype)}), mapping)["w"]
    allowed = Weights(Checkpoint.open(tmp_path, allow_nan=True), mapping)["w"]
    assert not torch.isfinite(allowed[57, 1])
    assert torch.isfinite(allowed).sum() == 299


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"x": torch.tensor([70000.0])})
    with pytest.raises(UserError, match="'x' has values beyond the range of float16"):
        Weights(opened, {"x": Source("x")}, torch.float16)["x"]


def test_reading_a_large_checkpoint_stays_small(tmp_path: Path) -> None:
    """128 MiB of bfloat16, read tensor by tensor as float32: the process grows by a few tensors, not by the file."""
    chunk = torch.zeros(4 << 20, dtype=torch.bfloat16)
    checkpoint(tmp_path, {f"layer.{i}": chunk for i in range(16)})
    script = (
        "import resource, sys\n"
        "from graphs.weights import Checkpoint, Source, Weights\n"
        "opened = Checkpoint.open(sys.argv[1])\n"
        "weights = Weights(opened, {n: Source(n) for n in opened.names()})\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak()\n"
        "total = sum(weights[name].sum().item() for name in weights)\n"
        "print(total, peak() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    total, grown = run.stdout.split()
    assert float(total) == 0.0
    assert int(grown) < 80


def test_large_tensors_are_looked_through_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the last part is found; first rows are read and looked through alone; the mapped file is let go of."""
    tensor = torch.ones(100, 3)
    tensor[99, 2] = torch.nan
    weights = Weights(
        checkpoint(tmp_path, {"w": tensor, "fine": torch.ones(100, 3)}), {n: Source(n) for n in ("w", "fine")}
    )
    released = []
    monkeypatch.setattr(weights, "release", released.append)
    monkeypatch.setattr("graphs.weights.PART", 30)
    with pytest.raises(UserError, match="tensor 'w' holds NaN or Inf"):
        weights.stored("w")
    assert released == ["w"] * 9
    assert torch.equal(weights.stored("w", 99), tensor[:99])
    assert torch.equal(weights.stored("fine"), torch.ones(100, 3))
    assert released.count("fine") == 10
    drawn = RandomWeights(0, {"scale": torch.Size([]), "w": torch.Size([5, 3])})
    assert drawn.stored("scale").shape == ()
    assert torch.equal(drawn.stored("w", 2), drawn["w"][:2])


class Block(nn.Module):
    """One of each kind of parameter that random weights tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 64)
        self.position_embeddings = nn.Parameter(torch.empty(1, 10, 64))
        self.linear = nn.Linear(64, 256)
        self.conv = nn.Conv2d(3, 256, 7)
        self.input_layernorm = nn.LayerNorm(64)
        self.block = nn.Sequential(nn.GroupNorm(4, 64), nn.BatchNorm2d(64))


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in ModuleWeights(module).items()}


def test_random_weights_are_drawn_by_kind() -> None:
    weights = RandomWeights(3, shapes(Block()))
    weights.check(shapes(Block()))
    spread = {name: weights[name].std().item() for name in weights if weights[name].numel() > 1}
    assert spread["embed_tokens.weight"] == pytest.approx(0.02, rel=0.05)
    assert spread["position_embeddings"] == pytest.approx(0.02, rel=0.1)
    assert spread["linear.weight"] == pytest.approx(64**-0.5, rel=0.03)
    assert spread["conv.weight"] == pytest.approx(147**-0.5, rel=0.03)
    for name in ("input_layernorm.weight", "block.0.weight", "block.1.weight", "block.1.running_var"):
        assert torch.equal(weights[name], torch.ones(64))
    for name in ("linear.bias", "conv.bias", "input_layernorm.bias", "block.1.running_mean"):
        assert not weights[name].any()
    assert weights.origin == "random (seed 3)"


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    wanted = {"a.weight": torch.Size([8, 8]), "b.weight": torch.Size([8, 8])}
    both, alone = RandomWeights(1, wanted), RandomWeights(1, {"b.weight": torch.Size([8, 8])})
    assert torch.equal(both["b.weight"], alone["b.weight"])
    assert torch.equal(both["b.weight"], both["b.weight"])
    assert not torch.equal(both["a.weight"], both["b.weight"])
    assert not torch.equal(both["b.weight"], RandomWeights(2, wanted)["b.weight"])
    assert RandomWeights(1, wanted, torch.float16)["a.weight"].dtype == torch.float16


def test_random_weights_keep_deep_networks_finite() -> None:
    weights = RandomWeights(0, {f"layers.{i}.weight": torch.Size([64, 64]) for i in range(100)})
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    for weight in weights.values():
        x = weight @ x
    assert 0.1 < x.std().item() < 10


def test_module_weights_give_what_the_module_holds() -> None:
    module = Block().half()
    weights = ModuleWeights(module)
    assert torch.equal(weights["linear.weight"], module.linear.weight.float())
    assert not weights["linear.weight"].requires_grad
    assert weights["block.1.num_batches_tracked"].dtype == torch.int64
    assert ModuleWeights(module, None)["linear.weight"].dtype == torch.float16
    with pytest.raises(UserError, match=r"1 missing: gone; \d+ unexpected: .*; 1 misshapen: linear.bias \[256\]"):
        weights.check({"gone": torch.Size([1]), "linear.bias": torch.Size([2])})


def test_weights_of_any_kind_can_be_written_and_read_back(tmp_path: Path) -> None:
    random = RandomWeights(5, shapes(Block()))
    opened = checkpoint(tmp_path, random)  # type: ignore[arg-type]
    back = Weights(opened, {name: Source(name) for name in random})
    assert all(torch.equal(back[name], random[name]) for name in random)
