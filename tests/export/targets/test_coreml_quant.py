"""Quantized programs as Core ML packages: weights stay packed, numbers stay those of the eager graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from calibration.source import Calibration
from export.gate import Limit
from export.targets.base import Lowered, LowerOptions
from export.targets.coreml import TARGET
from export.verify import compare, inputs_of, program_signatures, record, relative_l2, seeded_inputs
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.program import Program, Signature, TracedMethod
from graphs.spec import TensorSpec
from graphs.trace import trace, trace_module
from quant.algorithms.base import blocks, least_scale, round_blocks
from quant.algorithms.palette import palette
from quant.apply import Quantization
from quant.insert import Choice, insert
from quant.precision import CastFloats
from quant.recipe import Recipe, Rule
from quant.resolve import all_layers, resolve
from quant.scheme import Scheme, WeightScheme
from runtimes.base import Artifact
from runtimes.coreml import CoreMLRuntime
from runtimes.eager import EagerRuntime
from runtimes.mil.model import MilModel
from tests.tiny import tiny_program

PIXELS = TensorSpec("x", (1, 8, 16, 16))
ROWS = TensorSpec("x", (1, 5, 256))
IDS = TensorSpec("x", (1, 7), torch.int64, values="ids", high=100)


def lower(program: Program, directory: Path, floats: str = "float16") -> Lowered:
    return TARGET.lower(TARGET.legalize(program), directory, LowerOptions(floats, dict.fromkeys(program, Limit(1e-2))))


def parts(weight: Tensor, scheme: WeightScheme) -> Mapping[str, Tensor]:
    """Rounded to nearest, as a graph keeps it."""
    if scheme.kind == "palette":
        found = palette(weight, scheme.bits)
        return {"index": found.index, "table": found.table}
    whole = blocks(weight.flatten(1), scheme.group)
    made = round_blocks(whole, *least_scale(whole, scheme), scheme)
    shape = made.scale.shape if scheme.group else (len(weight), *[1] * (weight.dim() - 1))
    zero = {} if made.zero_point is None else {"zero_point": made.zero_point.view(shape)}
    return {"q": made.q.view(weight.shape), "scale": made.scale.view(shape), **zero}


class Side(nn.Module):
    """Layers side by side, all reading the one input."""

    def __init__(self, make: Callable[[], nn.Module], names: Sequence[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, make())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.children())


def program_of(make: Callable[[], nn.Module], spec: TensorSpec, outputs: Sequence[str], **given: Tensor) -> Program:
    """A module as the one method of a program, its weights random but for those given."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module = make().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(t.shape, generator=generator) for name, t in module.state_dict().items()} | given
    signature = Signature((spec,), tuple(TensorSpec(name, ()) for name in outputs))
    method = TracedMethod(signature, trace_module(module, (spec,), mode), {name: name for name in weights})
    return Program({"m": method}, weights, {})


def quantized(make: Callable[[], nn.Module], spec: TensorSpec, texts: Sequence[str]) -> Program:
    """A layer for each scheme, outputs named by them."""
    program = program_of(lambda: Side(make, texts), spec, texts)
    choices = {}
    for layer, text in zip(all_layers(program), texts, strict=True):
        assert text in TARGET.capabilities.schemes[layer.kind]
        scheme = Scheme.parse(text)
        weight = program.tensor("m", layer.entry)
        read = (torch.tensor(3 / 127), torch.tensor(-9, dtype=torch.int8)) if scheme.needs_ranges else None
        gives = (torch.tensor(0.2), torch.tensor(-128, dtype=torch.int8)) if scheme.activations == "a8o" else None
        made = parts(weight, scheme.weights)
        choices["m", layer.entry] = Choice(scheme, text, lambda made=made: made, read, gives)
    return insert(program, choices)


def run(program: Program, directory: Path, floats: str = "float16") -> tuple[dict[str, float], dict[str, int], int]:
    """The error of each output against the eager quantized program, the operators, the bytes of weights."""
    lowered = lower(program, directory, floats)
    signature = program.methods["m"].signature
    (inputs,) = next(iter(signature.method("m").examples(seed=1)))
    found = MilModel(directory / lowered.files["m"])({"x": inputs.numpy()})
    expected = program.module("m")(inputs)
    names = [spec.name for spec in signature.outputs]
    errors = {name: relative_l2([found[name]], [value.numpy()]) for name, value in zip(names, expected, strict=True)}
    details = lowered.details["methods"]["m"]
    return errors, details["operators"], details["weight_bytes"]


def promised(shape: tuple[int, ...], text: str) -> float:
    """Bytes of a weight, its scales and zero points, or its palette, with scales and tables in two bytes."""
    scheme = Scheme.parse(text).weights
    size = torch.Size(shape).numel()
    if scheme.kind == "palette":
        return size * scheme.bits / 8 + 2 * 2**scheme.bits
    scales = size / scheme.group if scheme.group else shape[0]
    return size * scheme.bits / 8 + scales * (2 + (scheme.bits / 8 if scheme.asymmetric else 0))


LINEAR = (
    *("w8", "w8z", "w8g32", "w4", "w4g32", "w4g32z", "w4g64", "w4g128", "w4g128z"),
    *("w8a8", "w8a8o", "p4", "p6", "p8"),
)
CONV = ("w8", "w8z", "w4", "w4z", "w8a8", "w8a8o")
EMBEDDING = ("w8", "w8z", "w4", "w4g32", "w4g32z", "w8g64")


def test_linear_layers_keep_their_packed_weights(tmp_path):
    errors, operators, size = run(quantized(lambda: nn.Linear(256, 512), ROWS, LINEAR), tmp_path)
    static = [errors.pop(text) for text in ("w8a8", "w8a8o")]
    assert max(static) < 1e-2, static  # here and there a rounding to int8 falls the other way
    assert max(errors.values()) < 1e-3, errors
    assert operators == {
        "linear": len(LINEAR),
        "constexpr_blockwise_shift_scale": len(LINEAR) - 3,
        "constexpr_lut_to_dense": 3,
        "quantize": 2,  # one for both layers that read the input by the same range, one for an output
        "dequantize": 2,
        "cast": operators["cast"],
    }
    assert operators["cast"] <= len(LINEAR) + 1  # the float32 input and outputs
    total = sum(promised((512, 256), text) + 2 * 512 for text in LINEAR)  # with the bias
    assert abs(size - total) < 0.01 * total


def test_convolutions_keep_their_packed_weights(tmp_path):
    errors, operators, size = run(quantized(lambda: nn.Conv2d(8, 64, 4, 4), PIXELS, CONV), tmp_path)
    static = [errors.pop(text) for text in ("w8a8", "w8a8o")]
    assert max(static) < 1e-2, static
    assert max(errors.values()) < 1e-3, errors
    assert (operators["conv"], operators["constexpr_blockwise_shift_scale"]) == (len(CONV), len(CONV))
    assert (operators["quantize"], operators["dequantize"]) == (2, 2)
    total = sum(promised((64, 8, 4, 4), text) + 2 * 64 for text in CONV)
    assert abs(size - total) < 0.05 * total


def test_embeddings_are_gathered_from_their_packed_tables(tmp_path):
    program = quantized(lambda: nn.Embedding(400, 128), IDS, EMBEDDING)
    gathers = [str(node.target) for node in program.methods["m"].exported.graph.nodes].count("aten.embedding.default")
    assert gathers == 2 * len(EMBEDDING) + 2  # integers, scales and here and there zero points
    errors, operators, size = run(program, tmp_path)
    assert max(errors.values()) < 1e-3, errors
    assert (operators["gather"], operators["constexpr_blockwise_shift_scale"]) == (len(EMBEDDING), len(EMBEDDING))
    assert set(operators) <= {"constexpr_blockwise_shift_scale", "gather", "cast"}
    total = sum(promised((400, 128), text) for text in EMBEDDING)
    assert abs(size - total) < 0.02 * total


class Gathered(nn.Module):
    """An embedding whose table is a palette, one for 25 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.zeros(100, 128, dtype=torch.uint8))
        self.register_buffer("table", torch.zeros(4, 64))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (nn.functional.embedding(x, torch.ops.vlmx.palette(self.index, self.table, 6)),)


def test_palettes_are_shared_by_groups_of_rows(tmp_path):
    index = torch.randint(0, 64, (100, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    errors, operators, size = run(program_of(Gathered, IDS, ["y"], index=index), tmp_path)
    assert errors["y"] < 1e-3
    assert (operators["constexpr_lut_to_dense"], operators["gather"]) == (1, 1)
    assert abs(size - 100 * 128 * 6 / 8 - 4 * 64 * 2) < 0.05 * size


def test_single_precision_and_a_channel_of_zeros(tmp_path):
    program = quantized(lambda: nn.Linear(256, 512), ROWS, ("w8", "w4g32z"))
    made = {name: program.value(name).clone() for name in ("w8.q", "w8.scale")}
    made["w8.q"][3], made["w8.scale"][3] = 0, 2.0**-24  # the least scale there is in half precision
    program = Program(program.methods, program.weights, {**program.constants, **made})
    errors, operators, _ = run(program, tmp_path, "float32")
    assert max(errors.values()) < 1e-6, errors
    assert operators == {"constexpr_blockwise_shift_scale": 2, "linear": 2}


RULES = (
    Rule("vision_encoder/*", ("w8a8",)),
    Rule("token_embedding", ("w4g32",)),
    Rule("text_decoder/*q_proj", ("w4g32z",)),
    Rule("text_decoder/*k_proj", ("w8",)),
    Rule("text_decoder/*v_proj", ("p6",)),
    Rule("text_decoder/*o_proj", ("p8",)),
    Rule("text_decoder/*gate_proj", ("w4g64",)),
    Rule("text_decoder/*up_proj", ("p4",)),
    Rule("text_decoder/*", ("w4g32",)),
)


@dataclass
class Nano:
    program: Program
    directory: Path
    lowered: Lowered


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Nano:
    """The trained nano with about every scheme somewhere."""
    model = load_model(Request("mobilevlm", checkpoint="zoo:mobilevlm-nano"))
    source = trace(model.architecture, model.weights)
    resolved = resolve(Recipe("test", "", layers=RULES), source, "coreml", TARGET.capabilities)
    assert (resolved.floats, resolved.cast) == ("float16", False)  # coremltools casts a program in single precision
    statistics = Calibration(count=4).statistics(model, source, "", False, lambda line: None)
    program = Quantization(resolved, statistics).apply(source)
    directory = tmp_path_factory.mktemp("nano")
    return Nano(program, directory, lower(program, directory))


def test_a_quantized_nano_computes_its_graph(nano):
    signatures = program_signatures(nano.program)
    runtime = CoreMLRuntime.load(Artifact(nano.directory, signatures, nano.lowered.files, nano.lowered.details))
    expected = record(EagerRuntime(nano.program), seeded_inputs(signatures))
    actual = record(runtime, inputs_of(expected))
    errors = {name: entry["relative_l2"] for name, entry in compare(actual, expected).items()}
    assert 1e-5 < errors["token_embedding"] < 1e-3
    assert 1e-5 < errors["text_decoder"] < TARGET.capabilities.limit("float16", True)
    # Rounding to int8 layer upon layer turns differences of fp16 into steps: torch in half precision is as far away.
    half = record(EagerRuntime(CastFloats(torch.float16).run(nano.program)), inputs_of(expected))
    noise = compare(half, expected)["vision_encoder"]["relative_l2"]
    assert 1e-5 < errors["vision_encoder"] < 1.3 * noise


def test_every_layer_of_a_quantized_nano_is_packed(nano):
    for name, traced in nano.program.methods.items():
        nodes = [str(node.target) for node in traced.exported.graph.nodes]
        operators = nano.lowered.details["methods"][name]["operators"]
        packed = operators["constexpr_blockwise_shift_scale"] + operators.get("constexpr_lut_to_dense", 0)
        assert operators.get("linear", 0) == nodes.count("aten.linear.default")
        assert operators.get("conv", 0) == nodes.count("aten.conv2d.default")
        assert packed == max(1, operators.get("linear", 0) + operators.get("conv", 0))
        assert operators.get("quantize", 0) == operators.get("dequantize", 0) == nodes.count("vlmx.quantize.default")


def test_what_core_ml_lacks_is_refused_with_the_nearest_it_has():
    source = tiny_program("tiny")
    for text, message in (("w8a8t", "w8a8"), ("f8af8", "coreml has no kernels for f8af8"), ("w4g32a8b", "w4g32")):
        rule = Rule("text_decoder/*", (text,))
        with pytest.raises(UserError, match=message):
            resolve(Recipe("test", "", layers=(rule,)), source, "coreml", TARGET.capabilities)
    with pytest.raises(UserError, match="coreml keeps no int8 KV cache"):
        resolve(Recipe("test", "", kv_cache=("int8",)), source, "coreml", TARGET.capabilities)
