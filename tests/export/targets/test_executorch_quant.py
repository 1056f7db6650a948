"""Quantized layers in a .pte: XNNPACK's integer kernels, by name, with the numbers of the quantized graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export.gate import Limit
from export.targets.base import Lowered, LowerOptions
from export.targets.executorch import FILE, TARGET
from export.targets.executorch_quant import pack4
from export.verify import compare, program_signatures, record, seeded_inputs
from graphs.errors import UserError
from graphs.program import Program, Signature
from graphs.rewrite import Opened
from graphs.spec import Dim, TensorSpec
from quant.insert import Choice, insert
from quant.kv_cache import Int8Cache
from quant.layers import layers
from quant.scheme import Scheme
from runtimes.base import Artifact, load_runtime
from runtimes.eager import EagerRuntime
from tests.tiny import toy_program

WIDTH, TOKENS, CONTEXT = 64, 96, 16
LENGTH = Dim("length", 1, CONTEXT)


class Words(nn.Module):
    """Two linear layers that read one input, and one behind them, with and without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.left = nn.Linear(WIDTH, 2 * WIDTH)
        self.right = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return x + self.down(torch.sigmoid(self.left(x)) * self.right(x))


class Picture(nn.Module):
    """A plain and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.depthwise(torch.relu(self.plain(pixels)))


class Memory(nn.Module):
    """Rows written into a cache, all of it read."""

    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 2, CONTEXT, 8))

    def forward(self, rows: Tensor, positions: Tensor) -> Tensor:
        self.cache.copy_(self.cache.index_copy(2, positions, rows))
        return self.cache * 2


IDS = TensorSpec("ids", (1, LENGTH), torch.int64, "ids", TOKENS)
PIXELS = TensorSpec("pixels", (1, 3, 12, 12))
ROWS = TensorSpec("rows", (1, 2, LENGTH, 8))
POSITIONS = TensorSpec("positions", (LENGTH,), torch.int64, "positions")


def program(module: type[nn.Module], inputs: tuple[TensorSpec, ...], state: tuple[TensorSpec, ...] = ()) -> Program:
    """`module` with random weights as the only method of a program."""
    return toy_program("net", module, Signature(inputs, (TensorSpec("y", ()),), state))


def rounded(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """Round to nearest; scales of groups are such as bfloat16 holds, which is how XNNPACK keeps them."""
    most = (1 << scheme.weights.bits - 1) - 1
    blocks = weight.unflatten(-1, (-1, scheme.weights.group)) if scheme.weights.group else weight.flatten(1)
    scale = blocks.abs().amax(-1, keepdim=True) / most
    scale = scale.bfloat16().float() if scheme.weights.group else scale
    q = (blocks / scale).round().clamp(-most - 1, most).reshape(weight.shape).to(torch.int8)
    shape = (weight.shape[0], *[1] * (weight.dim() - 1))
    return {"q": q, "scale": scale.squeeze(-1) if scheme.weights.group else scale.view(shape)}


def quantized(plain: Program, schemes: dict[str, str], scale: float = 0.05) -> Program:
    """`plain` with each kind of layer in its scheme; constant ranges are 256 steps of `scale`."""
    choices = {}
    for layer in layers(Opened.open(plain, "net")):
        if layer.kind in schemes:
            scheme = Scheme.parse(schemes[layer.kind])
            span = (torch.tensor(scale), torch.tensor(5, dtype=torch.int8))
            choices["net", layer.entry] = Choice(
                scheme,
                layer.entry,
                lambda entry=layer.entry, scheme=scheme: rounded(plain.weights[entry], scheme),
                span if scheme.needs_ranges else None,
                span if scheme.activations == "a8o" else None,
            )
    return insert(plain, choices)


def lowered(quantized: Program, directory: Path) -> tuple[Lowered, float]:
    """What lowering says of the method, and its relative L2 error against the same quantized graph in eager torch."""
    legal = TARGET.legalize(quantized)
    legal.check()
    made = TARGET.lower(legal, directory, LowerOptions("float32", dict.fromkeys(quantized, Limit(1e-2))))
    signatures = program_signatures(quantized)
    inputs = seeded_inputs(signatures, seed=1)
    actual = record(load_runtime("executorch", Artifact(directory, signatures, made.files, made.details)), inputs)
    return made, compare(actual, record(EagerRuntime(quantized), inputs))["net"]["relative_l2"]


@pytest.mark.parametrize(
    ("schemes", "kernel", "library"),
    [
        ({"linear": "w8a8t", "embedding": "w8"}, "linear qd8_f32_qc8w", "embedding_byte"),
        ({"linear": "w4a8t", "embedding": "w8g32"}, "linear qd8_f32_qc4w", "embedding_byte"),
        ({"linear": "w4g32a8t", "embedding": "w4"}, "linear qd8_f32_qb4w", "embedding_4bit"),
        ({"linear": "w4g64a8t", "embedding": "w4g32"}, "linear qd8_f32_qb4w", "embedding_4bit"),
        ({"linear": "w8a8o"}, "linear qs8_qc8w", ""),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else None,
)
def test_linear_layers_and_embeddings(schemes: dict[str, str], kernel: str, library: str, tmp_path: Path) -> None:
    """Every linear layer runs in the kernel of its scheme, in two delegates."""
    made, error = lowered(quantized(program(Words, (IDS,)), schemes), tmp_path)
    details: dict[str, Any] = made.details["methods"]["net"]
    assert details["kernels"] == {kernel: 3}
    assert details["delegates"] == 2
    outside = set(details["portable_operators"])
    assert outside == {f"quantized_decomposed::{library}" if library else "aten::embedding"}
    assert error <= 1e-2


def test_convolutions(tmp_path: Path) -> None:
    made, error = lowered(quantized(program(Picture, (PIXELS,)), {"conv": "w8a8o"}), tmp_path)
    details = made.details["methods"]["net"]
    assert details["kernels"] == {"conv qs8_qc8w": 1, "depthwise_conv qs8_qc8w": 1}
    assert error <= 1e-2


def test_four_bits_are_four_bits_in_the_file(tmp_path: Path) -> None:
    """Layers of one size: what a scheme saves is what its bits say."""
    sizes = {}
    for name, schemes in {
        "float": {},
        "int8": {"linear": "w8a8t", "embedding": "w8"},
        "int4": {"linear": "w4g32a8t", "embedding": "w4"},
    }.items():
        (tmp_path / name).mkdir()
        lowered(quantized(program(Words, (IDS,)), schemes), tmp_path / name)
        sizes[name] = (tmp_path / name / FILE).stat().st_size
    weights = WIDTH * (TOKENS + 6 * WIDTH)
    assert sizes["float"] - sizes["int8"] == pytest.approx(3 * weights, rel=0.1)
    assert sizes["int8"] - sizes["int4"] == pytest.approx(weights / 2, rel=0.15)


def test_a_cache_of_integers(tmp_path: Path) -> None:
    """Rows are rounded and the cache converted by the delegate; written in place."""
    state = TensorSpec("cache", (1, 2, CONTEXT, 8))
    plain = program(Memory, (ROWS, POSITIONS), (state,))
    made, error = lowered(Int8Cache().run(plain), tmp_path)
    outside = made.details["methods"]["net"]["portable_operators"]
    assert outside["aten::index_put_"] == 2
    assert not set(outside) & {"aten::_to_copy", "aten::round", "aten::clamp"}
    assert error <= 1e-2


def test_packing() -> None:
    assert pack4(torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)).tolist() == [[0x0F, 0x87]]


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ({"linear": "w8g32a8t"}, "no kernel for the groups of the weight 'left.weight_q'"),
        ({"linear": "w4g16a8t"}, "no kernel for the groups of the weight 'left.weight_q'"),
        ({"linear": "w3a8t"}, "no kernel for the weight 'left.weight_q'"),
        ({"embedding": "w3"}, "no kernel for the embedding 'table.weight_q'"),
    ],
)
def test_what_has_no_kernel_is_refused(schemes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TARGET.legalize(quantized(program(Words, (IDS,)), schemes))
