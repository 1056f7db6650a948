"""pixel_shuffle and ldp: without weights exactly mean pooling, with weights the trained layers, written anew."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.connectors.ldp import LDP, LDPv2
from graphs.compress.base import apply, parse, write
from graphs.compress.follow import FollowError, regrouped
from graphs.errors import UserError
from graphs.safetensors_io import write_safetensors
from tests.graphs.compress import rules
from tests.graphs.compress.test_place import OUT, SIDE, WIDTH, Resampler, encoder, mlp
from tests.numbers import relative_l2
from tests.tiny import tiny_program


def encode(program: Any, pixels: Tensor) -> Tensor:
    out: Tensor = program.module("vision_encoder")(pixels)
    assert program.methods["vision_encoder"].signature.outputs[0].shape == out.shape
    return out


def pooled(x: Tensor, factor: int) -> Tensor:
    """The mean of every square of tokens [1, N, D], in raster order, by slices."""
    side = int(x.shape[1] ** 0.5)
    grid = x.reshape(side, side, -1)
    parts = [grid[dy::factor, dx::factor] for dy in range(factor) for dx in range(factor)]
    return torch.stack(parts).double().mean(0).flatten(0, 1)[None]


def shuffled(x: Tensor, factor: int) -> Tensor:
    """Every square of tokens [1, N, D] in raster order as one wide token, row by row, by slices."""
    side = int(x.shape[1] ** 0.5)
    grid = x.reshape(side, side, -1)
    parts = [grid[dy::factor, dx::factor] for dy in range(factor) for dx in range(factor)]
    return torch.cat(parts, -1).flatten(0, 1)[None]


def tower_tokens(program: Any, x: Tensor) -> Tensor:
    """The tokens of a small encoder's tower: the same encoder with the identity for a projector."""
    bare = encoder(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    identity = {"projector.0.weight": torch.eye(WIDTH), "projector.0.bias": torch.zeros(WIDTH)}
    return encode(type(bare)(bare.methods, {**program.weights, **identity}, {}), x)


def eager(variant: str | None) -> tuple[Any, Tensor, Tensor]:
    """A MobileVLM's projector in double precision, pixels, and what its tower makes of them."""
    model, program = rules.model_of(variant)
    root = model.architecture.build().eval()
    root.load_state_dict(dict(model.weights), strict=False)
    module: Any = root.get_submodule("vision_encoder")
    pixels = next(program.methods["vision_encoder"].signature.method("v").examples(3))[0]
    with torch.no_grad():
        tokens = module.tower(module.normalize(pixels))
    return module.projector.double(), pixels, tokens


@pytest.mark.parametrize(
    ("variant", "factor", "count"), [("tiny", 2, 4), ("tiny-v2", 3, 16), (None, 2, 9), (None, 4, 4)]
)
def test_pixel_shuffle_is_mean_pooling_before_the_projector(variant: str | None, factor: int, count: int) -> None:
    projector, pixels, tokens = eager(variant)
    program = apply(parse(f"pixel_shuffle{{factor={factor}}}"), rules.model_of(variant)[1])
    if isinstance(projector, LDPv2):  # the graph pools by two, as it was traced
        projector.pooled = projector.grid // 2 // factor
    projector.grid //= factor
    with torch.no_grad():
        expected = projector(pooled(tokens, factor))
        actual = encode(program, pixels)
    assert actual.shape[1] == count
    assert relative_l2(actual, expected) <= 1e-6
    layer = "projector.mlp.0.weight" if variant == "tiny-v2" else "projector.mlp.1.weight"
    assert program.tensor("vision_encoder", layer).shape[1] == factor**2 * tokens.shape[-1]


@pytest.mark.parametrize("text", ["pixel_shuffle{factor=2};pixel_shuffle{factor=2}", "pixel_shuffle{factor=4}"])
def test_an_mlp_projector_takes_it_once_or_twice(text: str) -> None:
    torch.manual_seed(1)
    projector, x = mlp(), torch.randn(1, 3, SIDE, SIDE)
    program = encoder(copy.deepcopy(projector))  # which makes the copy's weights fake
    with torch.no_grad():
        expected = projector.double()(pooled(tower_tokens(program, x), 4))
    assert relative_l2(encode(apply(parse(text), program), x), expected) <= 1e-6


def test_pixel_shuffle_with_trained_weights(tmp_path: Path) -> None:
    projector, pixels, tokens = eager(None)
    generator = torch.Generator().manual_seed(0)
    wide, path = (
        {"weight": torch.randn(192, 9 * 192, generator=generator) / 40, "bias": torch.ones(192)},
        tmp_path / "w",
    )
    write_safetensors(path, wide)
    text = f"pixel_shuffle{{factor=3,weights={path}}}"
    assert write(parse(text)) == text
    program = apply(parse(text), rules.model_of(None)[1])
    with torch.no_grad():
        x = F.linear(shuffled(tokens, 3).double(), wide["weight"].double(), wide["bias"].double())
        x = projector.mlp[3](projector.mlp[2](x))
        expected = projector.mb_block(x.mT.unflatten(2, (4, 4))).flatten(2).mT
    assert relative_l2(encode(program, pixels), expected) < 1e-5
    with pytest.raises(UserError, match=r"'weight' is \[192, 1728\] instead of \[192, 768\]"):
        apply(parse(f"pixel_shuffle{{factor=2,weights={path}}}"), rules.model_of(None)[1])
    write_safetensors(path, {"weight": wide["weight"].fill_(torch.nan), "biases": wide["bias"]})
    with pytest.raises(UserError, match="no 'bias', 'biases' is unknown"):
        apply(parse(text), rules.model_of(None)[1])
    write_safetensors(path, {"weight": wide["weight"], "bias": wide["bias"]})
    with pytest.raises(UserError, match="'weight' holds NaN or Inf"):
        apply(parse(text), rules.model_of(None)[1])


@pytest.mark.parametrize("version", [1, 2])
def test_ldp_begins_as_mean_pooling_exactly(version: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(1, 3, SIDE, SIDE)
    program = encoder(mlp())
    assert torch.equal(
        encode(apply(parse(f"ldp{{version={version}}}"), program), x),
        encode(apply(parse("pool{factor=2}"), program), x),
    )
    pixels, found = rules.features(None, seed=3)
    program = apply(parse(f"ldp{{version={version}}};prune{{keep=4}}"), rules.model_of(None)[1])
    halved = rules.Features(rules.pool(found, 2), found.attention, found.keys, [])
    assert relative_l2(encode(program, pixels)[0], torch.from_numpy(rules.divprune(halved, 4))) < 1e-5
    branch = [name for name in program.constants if name.startswith("vision_encoder.compression_0_grid.")]
    assert len(branch) == (20 if version == 1 else 2)


@pytest.mark.parametrize("version", [1, 2])
def test_ldp_with_trained_weights_replaces_the_projector(version: int, tmp_path: Path) -> None:
    torch.manual_seed(3)
    x = torch.randn(1, 3, SIDE, SIDE)
    trained: Any = LDP(WIDTH, OUT, SIDE) if version == 1 else LDPv2(WIDTH, OUT, SIDE, SIDE // 2)
    trained = trained.eval().requires_grad_(False)
    public = (
        {"mlp.": "model.mlp.", "mb_block.": "model.mb_block."}
        if version == 1
        else {"mlp.": "mlp.mlp.", "peg.": "peg.peg.0."}
    )
    stored = {
        f"model.mm_projector.{theirs}{name.removeprefix(ours)}": value
        for name, value in trained.state_dict().items()
        for ours, theirs in public.items()
        if name.startswith(ours)
    }
    path = tmp_path / "projector.safetensors"
    write_safetensors(path, {**stored, "model.embed_tokens.weight": torch.ones(2, 2)})
    program = encoder(mlp())
    replaced = apply(parse(f"ldp{{version={version},weights={path}}}"), program)
    with torch.no_grad():
        assert relative_l2(encode(replaced, x), trained(tower_tokens(program, x))) < 1e-5
    names = set(replaced.methods["vision_encoder"].weight_names)
    assert {name.removeprefix("projector.") for name in names if name.startswith("projector.")} == set(
        trained.state_dict()
    )
    assert encode(apply(parse("prune{keep=2};"), replaced), x).shape == (1, 2, OUT)
    missing = "mlp.mlp.0.weight" if version == 1 else "model.mlp.1.weight"
    with pytest.raises(UserError, match=f"no 'mm_projector.{missing}'"):
        apply(parse(f"ldp{{version={3 - version},weights={path}}}"), program)
    with pytest.raises(UserError, match=r"is \[12, 8\] instead of \[12, 32\]"):
        apply(parse(f"pixel_shuffle{{factor=2}};ldp{{version={version},weights={path}}}"), program)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pixel_shuffle{factor=4}", "does not divide the grid of 6 x 6 tokens; the nearest that fits is factor=3"),
        ("pixel_shuffle{factor=0}", "factor=0 is not positive"),
        ("pool{factor=3};pixel_shuffle{factor=2}", "pixel_shuffle works before the projector: write it before"),
        ("pixel_shuffle{factor=2,weights=}", "weights= is not a path"),
        ("pixel_shuffle{factor=2,weights=nowhere/w.safetensors}", "nowhere/w.safetensors: No such file"),
        ("ldp{version=1}", "a grid of 3 x 3 tokens, which leave the encoder; the nearest that fits is pool{factor=3}"),
        ("ldp{version=3}", "ldp: version=3 is unknown: choose from: 1, 2"),
        ("prune{keep=8};ldp{version=2}", "no square grid of tokens: 8 leave the encoder in no grid; ldp before prune"),
        ("prune{keep=8};ldp{version=2,weights=w}", "ldp with weights replaces the projector: write it before"),
    ],
)
def test_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        apply(parse(text), tiny_program("tiny"))
    assert words in str(error.value)


class Pooled(nn.Module):
    """A projector that pools by two, and one that gives four tokens whatever it takes."""

    def __init__(self, adaptive: bool) -> None:
        super().__init__()
        self.linear, self.adaptive = nn.Linear(WIDTH, OUT), adaptive

    def forward(self, x: Tensor) -> Tensor:
        grid = self.linear(x).mT.unflatten(2, (SIDE, SIDE))
        return (F.adaptive_avg_pool2d(grid, 2) if self.adaptive else F.avg_pool2d(grid, 2)).flatten(2).mT


@pytest.mark.parametrize(
    ("adaptive", "factor", "words"),
    [
        (False, 4, "leaves a grid of 1 x 1 tokens, which the projector cannot take: windows of 2, 2 apart"),
        (True, 2, "leaves a grid of 2 x 2 tokens, which the projector cannot take: it gives 4 tokens all the same"),
    ],
)
def test_a_grid_that_the_projector_cannot_take(adaptive: bool, factor: int, words: str) -> None:
    with pytest.raises(UserError) as error:
        apply(parse(f"pixel_shuffle{{factor={factor}}}"), encoder(Pooled(adaptive)))
    assert words in str(error.value)
    assert f"the nearest that fits is factor={1 if adaptive else 2}" in str(error.value)


def test_a_projector_that_begins_otherwise_is_no_place() -> None:
    with pytest.raises(UserError, match="looked for one linear layer of 'projector' that reads the tokens"):
        apply(parse("pixel_shuffle{factor=2}"), encoder(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, OUT))))
    with pytest.raises(UserError, match="looked for one linear layer"):
        apply(parse("pixel_shuffle{factor=2}"), encoder(Resampler()))


def test_reshapes_follow_the_grid() -> None:
    assert regrouped((1, 64, 144), (1, 64, 12, 12), (1, 64, 36)) == [1, 64, 6, 6]
    assert regrouped((1, 64, 12, 12), (1, 64, 144), (1, 64, 6, 6)) == [1, 64, 36]
    assert regrouped((1, 144, 64), (144, 64), (1, 36, 64)) == [36, 64]
    assert regrouped((1, 144, 64), (1, 144, 4, 16), (1, 36, 64)) == [1, 36, 4, 16]
    with pytest.raises(FollowError, match=r"\[1, 144\] to \[9, 16\]"):
        regrouped((1, 144), (9, 16), (1, 36))
