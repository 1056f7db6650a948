from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from export.gate import Limit
from export.targets import coreml_convert, coreml_graph
from export.targets.base import Lowered, LowerOptions
from export.targets.coreml import TARGET
from export.verify import program_signatures, record, relative_l2, seeded_inputs
from graphs.errors import GateError
from graphs.model import Request, load_model
from graphs.program import Program, Signature, TracedMethod
from graphs.spec import Dim, TensorSpec
from graphs.trace import trace, trace_module
from runtimes.base import Artifact
from runtimes.coreml import CoreMLRuntime
from runtimes.eager import EagerRuntime
from runtimes.mil.model import MilModel
from runtimes.mil.package import Package

FACTS = {"variant": "tiny", "context": 64, "visual_tokens": 9, "eos_ids": [2], "bos_id": None, "template": {"a": 1}}


def traced(variant: str) -> Program:
    model = load_model(Request("mobilevlm", variant=variant))
    return trace(model.architecture, model.weights)


@dataclass
class Export:
    program: Program
    directory: Path
    lowered: Lowered
    lines: list[str]

    def runtime(self) -> CoreMLRuntime:
        signatures = program_signatures(self.program)
        return CoreMLRuntime.load(Artifact(self.directory, signatures, self.lowered.files, self.lowered.details))


def lower(program: Program, floats: str, directory: Path) -> Export:
    lines: list[str] = []
    options = LowerOptions(floats, dict.fromkeys(program, Limit(1e-2)), metadata=FACTS, progress=lines.append)
    lowered = TARGET.lower(TARGET.legalize(program), directory, options)
    return Export(program, directory, lowered, lines)


@pytest.fixture(scope="module")
def v1(tmp_path_factory) -> Export:
    return lower(traced("tiny"), "float16", tmp_path_factory.mktemp("v1"))


@pytest.fixture(scope="module")
def v2(tmp_path_factory) -> Export:
    vision = traced("tiny-v2")
    program = Program({"vision_encoder": vision.methods["vision_encoder"]}, vision.weights, vision.constants)
    return lower(program, "float16", tmp_path_factory.mktemp("v2"))


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Export:
    return lower(traced("tiny"), "float32", tmp_path_factory.mktemp("single"))


def errors(export: Export) -> dict[str, float]:
    """Of each method, the largest relative L2 error of its seeded calls against the eager graph."""
    expected = record(EagerRuntime(export.program), seeded_inputs(program_signatures(export.program)))
    actual = record(export.runtime(), {name: [c.inputs for c in calls] for name, calls in expected.items()})
    return {
        name: max(relative_l2(a.outputs, e.outputs) for a, e in zip(actual[name], calls, strict=True))
        for name, calls in expected.items()
    }


def test_every_method_computes_the_graph_in_fp16(v1, v2):
    found = errors(v1) | {"v2": errors(v2)["vision_encoder"]}
    assert set(found) == {"vision_encoder", "token_embedding", "text_decoder", "v2"}
    assert all(1e-5 < error < 4e-3 for error in found.values()), found  # fp16's, well within the gate's 1e-2


def test_single_precision_is_exact_but_for_the_fp16_cache(single):
    found = errors(single)
    assert found["vision_encoder"] < 1e-4
    assert found["token_embedding"] == 0
    assert 1e-5 < found["text_decoder"] < 1e-3
    details = single.lowered.details["methods"]
    assert (details["text_decoder"]["precision"], details["text_decoder"]["state_precision"]) == ("fp32", "fp16")
    assert {TARGET.capabilities.limit(floats, False) for floats in TARGET.capabilities.floats} == {1e-2}


@pytest.mark.parametrize(
    "lengths", [(64,), (1, 1, 1), (5, 1, 7, 1, 3), (63, 1), (20, 44)], ids=lambda value: "+".join(map(str, value))
)
def test_positions_from_one_token_to_the_full_context(v1, lengths):
    signature = v1.program.methods["text_decoder"].signature
    runtime, module = v1.runtime(), v1.program.module("text_decoder")
    for embeds, position in signature.method("text_decoder").examples(seed=3, lengths=lengths):
        (actual,) = runtime.call("text_decoder", [embeds.numpy(), position.numpy()])
        assert relative_l2([actual], [module(embeds, position).numpy()]) < 4e-3


def test_reset_forgets_and_a_second_prompt_overwrites(v1):
    runtime = v1.runtime()
    calls = list(v1.program.methods["text_decoder"].signature.method("text_decoder").examples(seed=1, lengths=(9, 2)))
    first = [runtime.call("text_decoder", [t.numpy() for t in call])[0] for call in calls]
    runtime.reset()
    assert all(not state.value.any() for state in runtime.methods["text_decoder"].executor.states.values())
    for call, expected in zip(calls, first, strict=True):
        assert np.array_equal(runtime.call("text_decoder", [t.numpy() for t in call])[0], expected)


def test_more_tokens_than_the_context_are_refused(v1):
    from runtimes.mil.registry import MilError

    runtime = v1.runtime()
    with pytest.raises(MilError, match="takes sizes"):
        runtime.call("token_embedding", [np.zeros((1, 65), np.int64)])
    tail = [np.zeros((1, 2, 64), np.float32), np.array([63, 64])]
    with pytest.raises(MilError):
        runtime.call("text_decoder", tail)


def test_the_packages_are_what_an_app_wants(v1):
    vision, embedding, decoder = (Package(v1.directory / f"{name}.mlpackage").spec for name in v1.program)
    assert {spec.specificationVersion for spec in (vision, embedding, decoder)} == {9}  # iOS 18
    image = vision.description.input[0]
    assert image.name == "pixel_values"
    color = type(image.type.imageType).ColorSpace.Name(image.type.imageType.colorSpace)
    assert (image.type.imageType.width, image.type.imageType.height, color) == (48, 48, "RGB")
    assert vision.description.output[0].name == "image_embeds"
    kinds = {i.name: i.type.multiArrayType for d in (embedding, decoder) for i in d.description.input}
    assert list(kinds) == ["input_ids", "inputs_embeds", "cache_position"]
    assert [kinds[name].ArrayDataType.Name(kinds[name].dataType) for name in kinds] == ["INT32", "FLOAT32", "INT32"]
    bounds = [(r.lowerBound, r.upperBound) for r in kinds["inputs_embeds"].shapeRange.sizeRanges]
    assert bounds == [(1, 1), (1, 64), (64, 64)]
    states = decoder.description.state
    assert [s.name for s in states] == [f"layers_{layer}_cache_{part}" for layer in (0, 1) for part in "kv"]
    array = states[0].type.stateType.arrayType
    assert (list(array.shape), array.ArrayDataType.Name(array.dataType)) == ([1, 2, 64, 16], "FLOAT16")
    facts = dict(decoder.description.metadata.userDefined)
    assert (facts["vlmx.context"], facts["vlmx.visual_tokens"], facts["vlmx.eos_ids"]) == ("64", "9", "[2]")
    assert (facts["vlmx.method"], facts["vlmx.variant"]) == ("text_decoder", "tiny")
    assert not any("date" in key for key in facts)
    assert decoder.description.metadata.shortDescription == "text_decoder of tiny, exported by vlmx"


def test_attention_stays_whole_and_each_cache_is_written_once(v1):
    counts = {name: v1.lowered.details["methods"][name]["operators"] for name in v1.program}
    assert counts["text_decoder"]["scaled_dot_product_attention"] == 2
    assert counts["text_decoder"]["slice_update"] == counts["text_decoder"]["write_state"] == 4
    assert counts["vision_encoder"]["scaled_dot_product_attention"] == 2
    assert counts["token_embedding"] == {"cast": 2, "gather": 1}
    model = MilModel(v1.directory / "text_decoder.mlpackage")
    assert {k: v for k, v in model.operators.items() if k != "const"} == counts["text_decoder"]


def test_the_directory_holds_the_packages_and_nothing_else(v1):
    names = sorted(path.name for path in v1.directory.iterdir())
    assert names == ["text_decoder.mlpackage", "token_embedding.mlpackage", "vision_encoder.mlpackage"]
    files = {p.relative_to(v1.directory).parts[1:] for p in v1.directory.rglob("*") if p.is_file()}
    inside = ("Data", "com.apple.CoreML")
    assert files == {("Manifest.json",), (*inside, "model.mlmodel"), (*inside, "weights", "weight.bin")}
    assert v1.lines[0] == "vision_encoder: converting to an ML program"
    assert len(v1.lines) == 6
    assert v1.runtime().version.startswith("coremltools MIL evaluated by vlmx reference evaluator, coremltools 9")


def test_the_same_program_gives_the_same_bytes_silently(v1, tmp_path, capfd):
    before = set(Path(tempfile.gettempdir()).iterdir())
    part = Program({"text_decoder": v1.program.methods["text_decoder"]}, v1.program.weights, v1.program.constants)
    again = lower(part, "float16", tmp_path)
    assert capfd.readouterr() == ("", "")
    new = set(Path(tempfile.gettempdir()).iterdir()) - before
    assert not [path for path in new if path.suffix == ".mlpackage"]
    for path in (again.directory / "text_decoder.mlpackage").rglob("*"):
        twin = v1.directory / path.relative_to(again.directory)
        assert path.is_dir() or path.read_bytes() == twin.read_bytes(), path.name


def test_legalize_leaves_the_program_and_its_signature_alone(v1):
    legal = TARGET.legalize(v1.program)
    legal.check()
    dtypes = []
    for program in (v1.program, legal):
        node = next(n for n in program.methods["vision_encoder"].exported.graph.nodes if n.name == "pixel_values")
        dtypes.append((node.meta["val"].dtype, program.methods["vision_encoder"].signature.inputs[0].dtype))
    assert dtypes == [(torch.uint8, torch.uint8), (torch.float32, torch.uint8)]
    pixels = next(v1.program.methods["vision_encoder"].signature.method("v").examples())[0]
    assert torch.equal(legal.module("vision_encoder")(pixels), v1.program.module("vision_encoder")(pixels))
    assert legal.methods["token_embedding"] is v1.program.methods["token_embedding"]


def converted(module: nn.Module, inputs: tuple[TensorSpec, ...], path: Path) -> MilModel:
    """A module of its own, in fp16."""
    exported = trace_module(module.eval().requires_grad_(False), inputs, FakeTensorMode(allow_non_fake_inputs=True))
    method = TracedMethod(Signature(inputs, (TensorSpec("y", ()),)), exported, {n: n for n in module.state_dict()})
    program = coreml_graph.legalize(Program({"m": method}, module.state_dict(), {}))
    coreml_convert.convert("m", program.exported("m"), method.signature, "fp16", path)
    return MilModel(path)


def test_rms_norm_survives_large_small_and_zero_rows_in_fp16(tmp_path):
    norm = nn.RMSNorm(256, 1e-6)
    x = torch.randn(1, 4, 256, generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor([1e4, 1.0, 2e-4, 0.0]).reshape(1, 4, 1)).half().float()
    assert float(x.abs().max()) > 2e4  # whose square fp16 does not have
    y = converted(norm, (TensorSpec("x", (1, 4, 256)),), tmp_path / "a.mlpackage")({"x": x.numpy()})["y"]
    for row in range(3):
        assert relative_l2([y[0, row]], [norm(x)[0, row].numpy()]) < 2e-3
    assert not y[0, 3].any()


class Choice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, 1.0, -30000.0) + torch.where(x > 1, x, 0.0)


def test_choices_between_numbers_take_the_shape_of_the_condition(tmp_path):
    dim = Dim("n", 1, 8)
    model = converted(Choice(), (TensorSpec("x", (1, dim)),), tmp_path / "a.mlpackage")
    x = torch.tensor([[-1.0, 0.5, 2.0]])
    assert model({"x": x.numpy()})["y"].tolist() == [[-30000.0, 1.0, 3.0]]


class Strange(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(x)


def test_what_coremltools_cannot_convert_is_named(tmp_path):
    with pytest.raises(GateError, match=r"coremltools cannot convert m: .*svd"):
        converted(Strange(), (TensorSpec("x", (4, 4)),), tmp_path / "a.mlpackage")
