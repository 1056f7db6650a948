"""ONNX files: the graph's numbers, clean graphs, weights read late and stored once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from torch import Tensor

import graphs
from export.gate import Limit
from export.targets.base import LIMITS, LowerOptions
from export.targets.onnx_graph import emit, write
from export.targets.onnxruntime import TARGET
from export.targets.state_io import explicit_state
from export.verify import compare, program_signatures, record, seeded_inputs
from graphs.program import Program
from runtimes.base import Artifact, load_runtime
from runtimes.eager import EagerRuntime
from tests.tiny import tiny_program


def lowered(program: Program, directory: Path, floats: str = "float32") -> Artifact:
    made = TARGET.lower(
        TARGET.legalize(program), directory, LowerOptions(floats, dict.fromkeys(program, Limit(LIMITS[floats])))
    )
    return Artifact(directory, program_signatures(program), made.files, made.details)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return lowered(tiny_program("tiny"), tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(("variant", "floats"), [("tiny-v2", "float32"), ("tiny", "float16")])
def test_numbers(variant: str, floats: str, tmp_path: Path) -> None:
    program = tiny_program(variant, floats)
    check_numbers(program, lowered(program, tmp_path, floats), LIMITS[floats])


def test_numbers_and_reset(artifact: Artifact) -> None:
    check_numbers(tiny_program("tiny"), artifact, LIMITS["float32"])


def check_numbers(program: Program, artifact: Artifact, limit: float) -> None:
    """Every method, a prefill and three steps, is near the graph's; after `reset` bit for bit the same again."""
    inputs = seeded_inputs(program_signatures(program), seed=1)
    runtime = load_runtime("onnxruntime", artifact)
    actual = record(runtime, inputs)
    errors = compare(actual, record(EagerRuntime(program), inputs))
    assert set(errors) == {"vision_encoder", "token_embedding", "text_decoder"}
    assert all(error["relative_l2"] <= limit for error in errors.values()), errors
    assert len(actual["text_decoder"]) == 4
    again = record(runtime, inputs)["text_decoder"]
    for first, second in zip(actual["text_decoder"], again, strict=True):
        assert np.array_equal(first.outputs[0], second.outputs[0])
        assert len(first.outputs) == 1


def test_caches_in_one_buffer_or_two(artifact: Artifact) -> None:
    details = artifact.details["methods"]["text_decoder"]
    assert sorted(details["in_place"]) == sorted(details["state"])
    two = {**artifact.details["methods"], "text_decoder": {**details, "in_place": []}}
    other = replace(artifact, details={**artifact.details, "methods": two, "threads": 1})
    inputs = {"text_decoder": seeded_inputs(artifact.signatures)["text_decoder"]}
    one_buffer = record(load_runtime("onnxruntime", artifact), inputs)
    errors = compare(record(load_runtime("onnxruntime", other), inputs), one_buffer)
    assert errors["text_decoder"]["relative_l2"] < 1e-6


def test_graph_is_clean(artifact: Artifact) -> None:
    model = onnx.load(artifact.directory / artifact.files["text_decoder"])
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert shapes["inputs_embeds"] == [1, "sequence", 64]
    assert shapes["logits"] == [1, "sequence", 256]
    assert shapes["past_key_values.1.value"] == shapes["present.1.value"] == [1, 2, 64, 16]
    own = [("com.microsoft", 1)]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", artifact.details["opset"]), *own]
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"IsNaN", "CastLike", "Constant", "SequenceAt", "SplitToSequence", "Identity"}
    assert len(model.graph.node) == artifact.details["methods"]["text_decoder"]["nodes"] <= 140
    stored = {initializer.name for initializer in model.graph.initializer}
    assert not any(node.op_type == "Transpose" and node.input[0] in stored for node in model.graph.node)
    wanted = {
        entry for entry in tiny_program("tiny").methods["text_decoder"].exported.state_dict if "cache" not in entry
    }
    assert wanted <= {name.removesuffix(".half") for name in stored}


def test_files_tell_nothing_of_the_machine(artifact: Artifact) -> None:
    own = Path(graphs.__file__).parent.parent
    for path in artifact.directory.iterdir():
        data = path.read_bytes()
        for secret in (str(own), str(artifact.directory), "site-packages", ".py", "stack_trace"):
            assert secret.encode() not in data, f"{path.name} holds {secret}"


class Watched(Mapping[str, Tensor]):
    """Weights that note who was read."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights, self.read = weights, list[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_weights_are_read_while_written_and_stored_once(tmp_path: Path) -> None:
    program = explicit_state(tiny_program("tiny"))
    watched = Watched(program.weights)
    program = replace(program, weights=watched)
    model = emit(program, "text_decoder")
    assert watched.read == []
    write(model, tmp_path / "text_decoder.onnx")
    assert len(watched.read) == len(set(watched.read)) == 20
    entries = program.methods["text_decoder"].exported.state_dict.values()
    weight_bytes = sum(tensor.nbytes for tensor in entries)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert weight_bytes < written < weight_bytes + 40_000
