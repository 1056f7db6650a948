"""Quantized programs in ONNX Runtime: the graph's own numbers, by integer kernels, in the bytes that were promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from export.gate import Limit
from export.targets.base import LowerOptions
from export.targets.onnxruntime import TARGET, optimized
from export.verify import compare, program_signatures, record, seeded_inputs
from graphs.program import Program, Signature
from graphs.rewrite import Opened
from graphs.spec import Dim, TensorSpec
from quant.insert import Choice, insert
from quant.kv_cache import Int8Cache
from quant.layers import layers
from quant.precision import CastFloats
from quant.scheme import Scheme, WeightScheme
from runtimes.base import Artifact, load_runtime
from runtimes.eager import EagerRuntime
from tests.tiny import tiny_program, toy_program

WIDTH, INNER, ROWS = 256, 512, 1024
HIDDEN = (1, Dim("sequence", 1, 64), WIDTH)


class Feed(nn.Module):
    """Two matrices, the second with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(nn.functional.silu(self.up(x)))
        return out


class Patches(nn.Module):
    """A strided convolution, a depthwise and a pointwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 8, 8), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 64, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Table(nn.Module):
    """An embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(ROWS, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.rows(ids)
        return out


NETWORKS: dict[str, tuple[Callable[[], nn.Module], TensorSpec, TensorSpec]] = {
    "linear": (Feed, TensorSpec("x", HIDDEN), TensorSpec("y", HIDDEN)),
    "conv": (Patches, TensorSpec("x", (1, 3, 64, 64)), TensorSpec("y", (1, 64, 8, 8))),
    "embedding": (Table, TensorSpec("ids", HIDDEN[:2], torch.int64, "ids", ROWS), TensorSpec("y", HIDDEN)),
}


def network(kind: str) -> Program:
    """One of the networks with random weights, its method named after it."""
    make, given, made = NETWORKS[kind]
    return toy_program(kind, make, Signature((given,), (made,)))


def rounded(weight: Tensor, scheme: WeightScheme) -> dict[str, Tensor]:
    """Round to nearest; zero points where the scheme has them."""
    if scheme.kind == "float8":
        scale = weight.abs().amax(1, keepdim=True) / 448
        return {"q": (weight / scale).to(torch.float8_e4m3fn), "scale": scale}
    least, most = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    blocks = weight.unflatten(-1, (-1, scheme.group)) if scheme.group else weight
    axes = -1 if scheme.group else tuple(range(1, weight.dim()))
    low, high = blocks.amin(axes, keepdim=True).clamp(max=0), blocks.amax(axes, keepdim=True).clamp(min=0)
    scale = (high - low) / (most - least) if scheme.asymmetric else torch.maximum(high, -low) / most
    zero = (least - low / scale).round().clamp(least, most) if scheme.asymmetric else torch.zeros_like(scale)
    q = ((blocks / scale).round() + zero).clamp(least, most)
    if scheme.group:
        q, scale, zero = q.flatten(-2), scale.squeeze(-1), zero.squeeze(-1)
    parts = {"q": q.to(torch.int8), "scale": scale}
    return {**parts, "zero_point": zero.to(torch.int8)} if scheme.asymmetric else parts


def quantized(program: Program, schemes: dict[str, str], zero_point: int | None = 3, reach: float = 4.0) -> Program:
    """`program` with every layer of the kinds in `schemes` quantized; activations are taken to lie within `reach`."""
    zero = None if zero_point is None else torch.tensor(zero_point, dtype=torch.int8)

    def choice(method: str, entry: str, text: str) -> Choice:
        scheme, name = Scheme.parse(text), program.methods[method].weight_names[entry]
        range_ = (torch.tensor(reach / 127), zero) if scheme.needs_ranges else None
        output = range_ if scheme.activations == "a8o" else None
        return Choice(scheme, name, lambda: rounded(program.value(name), scheme.weights), range_, output)

    return insert(
        program,
        {
            (method, layer.entry): choice(method, layer.entry, schemes[layer.kind])
            for method in program
            for layer in layers(Opened.open(program, method))
            if layer.kind in schemes
        },
    )


def lowered(program: Program, directory: Path, floats: str = "float32") -> tuple[dict[str, float], dict[str, Any]]:
    """Errors by method against the graph in eager mode, and the details by method."""
    made = TARGET.lower(TARGET.legalize(program), directory, LowerOptions(floats, dict.fromkeys(program, Limit(1e-2))))
    inputs = seeded_inputs(program_signatures(program), seed=1)
    artifact = Artifact(directory, program_signatures(program), made.files, {**made.details, "threads": 1})
    errors = compare(record(load_runtime("onnxruntime", artifact), inputs), record(EagerRuntime(program), inputs))
    return {method: error["relative_l2"] for method, error in errors.items()}, made.details["methods"]


NBITS = (
    "w4g32",
    "w3g64",
    "w4g16z",
    "w8g128",
    "w4",
    "w8z",
    "w4g32a8b",
    "w3g32a8b",
    "w8g256a8b",
    "w4g64za8b",
    "w8g16za8b",
)


@pytest.mark.parametrize("text", NBITS)
def test_blocks(text: str, tmp_path: Path) -> None:
    scheme = Scheme.parse(text)
    errors, details = lowered(quantized(network("linear"), {"linear": text}), tmp_path)
    assert errors["linear"] < 1e-5 if not scheme.activations else errors["linear"] < 1e-3
    assert details["linear"]["operators"]["MatMulNBits"] == 2
    assert details["linear"]["optimized_operators"]["MatMulNBits"] == 2
    assert "DequantizeLinear" not in details["linear"]["operators"]
    nodes = [n for n in onnx.load(tmp_path / "linear.onnx", load_external_data=False).graph.node if len(n.attribute)]
    levels = {a.i for n in nodes for a in n.attribute if a.name == "accuracy_level"}
    assert levels == {4 if scheme.activations == "a8b" else 0}
    bits = 8 if scheme.weights.bits == 8 else 4
    group = scheme.weights.group or 256
    numbers = 2 * WIDTH * INNER
    promised = numbers * bits / 8 + numbers / group * (4 + (bits / 8 if scheme.weights.asymmetric else 0)) + 4 * WIDTH
    assert promised <= sum(path.stat().st_size for path in tmp_path.iterdir()) <= promised + 8_000


@pytest.mark.parametrize("zero_point", [None, -20])
def test_static(zero_point: int | None, tmp_path: Path) -> None:
    errors, details = lowered(quantized(network("linear"), {"linear": "w8a8"}, zero_point), tmp_path)
    assert errors["linear"] < 1e-3
    for counts in (details["linear"]["operators"], details["linear"]["optimized_operators"]):
        assert counts["MatMulIntegerToFloat"] == 2
        assert counts["QuantizeLinear"] == 2
        assert not counts.keys() & {"DequantizeLinear", "MatMul", "Gemm"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2 * WIDTH * INNER + 15_000


def test_per_token(tmp_path: Path) -> None:
    errors, details = lowered(quantized(network("linear"), {"linear": "w8a8t"}), tmp_path)
    assert errors["linear"] < 1e-3
    for counts in (details["linear"]["operators"], details["linear"]["optimized_operators"]):
        assert counts["MatMulIntegerToFloat"] == counts["QuantizeLinear"] == 2
        assert not counts.keys() & {"DequantizeLinear", "MatMul"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2 * WIDTH * INNER + 20_000


def test_tokens_off_zero_keep_their_numbers(tmp_path: Path) -> None:
    program = quantized(network("linear"), {"linear": "w8a8t"})
    made = TARGET.lower(TARGET.legalize(program), tmp_path, LowerOptions("float32", {"linear": Limit(1e-2)}))
    artifact = Artifact(tmp_path, program_signatures(program), made.files, {**made.details, "threads": 1})
    offsets = torch.tensor([0.0, 50.0, -50.0, 1e-3, -1e3]).reshape(1, -1, 1)
    x = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(3)) + offsets
    x[:, 3] = 0.0
    runtimes = load_runtime("onnxruntime", artifact), EagerRuntime(program)
    ours, eager = (torch.from_numpy(runtime.call("linear", [x.numpy()])[0]) for runtime in runtimes)
    assert torch.isfinite(ours).all()
    assert ((ours - eager).norm(dim=-1) / eager.norm(dim=-1)).max() < 1e-4


@pytest.mark.parametrize(
    ("text", "operator", "size"),
    [
        ("w8", "Gather", ROWS * WIDTH + ROWS * 4),
        ("w8g64", "Gather", ROWS * WIDTH * (1 + 4 / 64)),
        ("w4", "GatherBlockQuantized", ROWS * WIDTH * (0.5 + 4 / 256)),
        ("w4g32", "GatherBlockQuantized", ROWS * WIDTH * (0.5 + 4 / 32)),
    ],
)
def test_embedding(text: str, operator: str, size: float, tmp_path: Path) -> None:
    errors, details = lowered(quantized(network("embedding"), {"embedding": text}), tmp_path)
    assert errors["embedding"] < 1e-6
    assert operator in details["embedding"]["operators"]
    assert size <= sum(path.stat().st_size for path in tmp_path.iterdir()) < size + 4_000


@pytest.mark.parametrize(("text", "operator"), [("w8", "DequantizeLinear"), ("w8a8o", "QLinearConv")])
def test_convolution(text: str, operator: str, tmp_path: Path) -> None:
    errors, details = lowered(quantized(network("conv"), {"conv": text}, reach=2.0), tmp_path)
    assert errors["conv"] < 1e-2
    assert details["conv"]["optimized_operators"][operator] == 3


@pytest.mark.parametrize("text", ["w8a8", "w8a8t", "w4g32a8b", "w4g32"])
def test_float16(text: str, tmp_path: Path) -> None:
    program = CastFloats(torch.float16).run(quantized(network("linear"), {"linear": text}))
    errors, details = lowered(program, tmp_path, "float16")
    assert errors["linear"] < 1e-2
    assert {"MatMulIntegerToFloat", "MatMulNBits"} & details["linear"]["operators"].keys()


def test_outputs(tmp_path: Path) -> None:
    errors, details = lowered(quantized(network("linear"), {"linear": "w8a8o"}), tmp_path)
    assert errors["linear"] < 1e-3
    assert details["linear"]["optimized_operators"]["MatMulIntegerToFloat"] == 2
    assert details["linear"]["optimized_operators"]["QuantizeLinear"] == 4


@pytest.mark.parametrize(
    ("kind", "text", "products"),
    [
        ("linear", "w8a8", "MatMulIntegerToFloat"),
        ("linear", "w8a8t", "MatMulIntegerToFloat"),
        ("conv", "w8a8o", "QLinearConv"),
    ],
)
def test_without_vnni_weights_are_shifted(
    kind: str, text: str, products: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every integer product is one that no x86 kernel saturates, and the runtime asks for it where they do."""
    monkeypatch.setattr("runtimes.onnxruntime.saturates", lambda: True)
    program = quantized(network(kind), {kind: text}, reach=2.0)
    made = TARGET.lower(TARGET.legalize(program), tmp_path, LowerOptions("float32", {kind: Limit(1e-2)}))
    artifact = Artifact(tmp_path, program_signatures(program), made.files, made.details)
    runtime: Any = load_runtime("onnxruntime", artifact)
    inputs = seeded_inputs(program_signatures(program), seed=1)
    assert compare(record(runtime, inputs), record(EagerRuntime(program), inputs))[kind]["relative_l2"] < 1e-2
    options = runtime.sessions[kind].session.get_session_options()
    types: dict[bool, set[int]] = {}
    for shifts in (False, True):
        entries = made.details["without_vnni"] if shifts else {}
        assert all(options.get_session_config_entry(key) == value for key, value in entries.items())
        graph = optimized(tmp_path / f"{kind}.onnx", entries)
        weights = {tensor.name: tensor.data_type for tensor in graph.initializer if len(tensor.dims) > 1}
        nodes = [node for node in graph.node if node.op_type == products]
        assert len(nodes) >= 2
        types[shifts] = {weights[name] for node in nodes for name in node.input if name in weights}
    assert types == {False: {onnx.TensorProto.INT8}, True: {onnx.TensorProto.UINT8}}


def test_products_of_floats_need_no_options(tmp_path: Path) -> None:
    program = quantized(network("linear"), {"linear": "w4g32a8b"})
    made = TARGET.lower(TARGET.legalize(program), tmp_path, LowerOptions("float32", {"linear": Limit(1e-2)}))
    assert "without_vnni" not in made.details


def test_decoder_with_integer_cache(tmp_path: Path) -> None:
    program = tiny_program("tiny")
    decoder = Program({"text_decoder": program.methods["text_decoder"]}, program.weights, program.constants)
    errors, details = lowered(Int8Cache().run(quantized(decoder, {"linear": "w4g16a8b"})), tmp_path)
    assert errors["text_decoder"] < 1e-2
    found = details["text_decoder"]
    assert found["operators"]["MatMulNBits"] == found["optimized_operators"]["MatMulNBits"] == 9
    assert len(found["state"]) == 8
    assert sorted(found["in_place"]) == sorted(found["state"])
    graph = onnx.load(tmp_path / "text_decoder.onnx", load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert sum(types[name] == onnx.TensorProto.INT8 for name in found["state"]) == 4
