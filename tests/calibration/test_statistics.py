"""Weighing modalities, and statistics through a file, damaged and foreign ones included."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from calibration.collect import collect
from calibration.moments import LayerStatistics, Moments, Outputs
from calibration.origin import Origin
from calibration.samples import open_samples
from calibration.statistics import Statistics
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.safetensors_io import write_safetensors
from tests.calibration.nano import collected, nano
from tests.tiny import tiny_program

KEY = ("text_decoder", "layers.0.self_attn.q_proj.weight")


def moments(rows: Tensor) -> Moments:
    return Moments(len(rows), rows.amin(0), rows.amax(0), rows.abs().sum(0), rows.square().sum(0), rows.T @ rows, rows)


def layer(image: int = 30, text: int = 10) -> tuple[LayerStatistics, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = 3 * torch.randn(image, 4, generator=generator), torch.randn(text, 4, generator=generator)
    outputs = Outputs(torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 5.0]), torch.zeros(1, 2))
    return LayerStatistics({"image": moments(images), "text": moments(texts)}, outputs), images, texts


def test_modalities_are_weighed() -> None:
    found, images, texts = layer()
    both = torch.cat([images, texts])
    natural = found.combined()
    torch.testing.assert_close(natural.hessian, both.T @ both / 40)
    torch.testing.assert_close(natural.absmean, both.abs().mean(0))
    torch.testing.assert_close(natural.mean_square, both.square().mean(0))
    torch.testing.assert_close(natural.absmax, both.abs().amax(0))
    assert (natural.low, natural.high) == (float(both.min()), float(both.max()))
    assert (natural.count, len(natural.rows)) == (40, 40)

    balanced = found.combined("balanced")
    torch.testing.assert_close(balanced.hessian, (images.T @ images / 30 + texts.T @ texts / 10) / 2)
    assert len(balanced.rows) == 20
    torch.testing.assert_close(balanced.rows[10:], texts)

    text = found.combined("text")
    torch.testing.assert_close(text.absmax, texts.abs().amax(0))
    torch.testing.assert_close(text.hessian, texts.T @ texts / 10)
    torch.testing.assert_close(found.combined({"image": 3, "text": 1}).absmean, both.abs().mean(0))
    assert (found.outputs.low, found.outputs.high) == (-1.0, 5.0)


def test_a_layer_without_the_modality_keeps_what_it_has() -> None:
    found, images, _ = layer()
    vision = LayerStatistics({"image": found.inputs["image"]}, found.outputs)
    for weighting in ("text", "balanced", "counts", {"text": 1.0}):
        torch.testing.assert_close(vision.combined(weighting).absmean, images.abs().mean(0))


@pytest.mark.parametrize(("weighting", "words"), [("ballanced", "'balanced'"), ({"text": -1.0}, "share of 0 or more")])
def test_weightings_that_are_none(weighting: str | dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        layer()[0].combined(weighting)


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    before = collected()
    before.save(tmp_path / "new" / "s.safetensors")
    after = Statistics.load(tmp_path / "new" / "s.safetensors", nano()[1])
    assert list(after) == list(before)
    assert after.origin == before.origin
    assert Origin.from_json(json.loads(json.dumps(before.origin.to_json()))) == before.origin
    for key in before:
        assert torch.equal(after[key].outputs.rows, before[key].outputs.rows)
        for name, moments in before[key].inputs.items():
            assert torch.equal(after[key].inputs[name].rows, moments.rows)
            hessian = after[key].inputs[name].hessian
            assert hessian is moments.hessian is None or torch.equal(hessian, moments.hessian)  # type: ignore[arg-type]
    assert after[KEY].inputs is after[KEY[0], KEY[1].replace("q_proj", "v_proj")].inputs
    assert len({id(layer.inputs) for layer in after.values()}) == len({id(layer.inputs) for layer in before.values()})


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "s.safetensors", tmp_path / "other"
    collected().save(path)
    content = path.read_bytes()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            Statistics.load(other)

    with pytest.raises(UserError, match="no-such"):
        Statistics.load(tmp_path / "no-such")
    for size in (0, 7, 100, len(content) - 1):
        other.write_bytes(content[:size])
        refused("other: ")
    other.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    refused("damaged statistics: its checksum")
    write_safetensors(other, tensors, metadata={"vlmx": "something else"})
    refused("not statistics of this version")
    record = json.loads(metadata["statistics"])
    for change in (
        {"layers": {}},
        {"layers": {"text_decoder": {"x": [10**6, 0]}}},
        {"layers": []},
        {"counts": [{"text": -1}] * len(record["counts"])},
        {"counts": "?"},
        {"origin": {**record["origin"], "count": "many"}},
        {"origin": None},
    ):
        text = json.dumps({**record, **change})
        write_safetensors(other, tensors, metadata={**metadata, "statistics": text})
        refused("damaged statistics")
    write_safetensors(other, tensors, metadata={**metadata, "statistics": "{"})
    refused("damaged statistics")


def test_statistics_of_another_program_are_refused() -> None:
    found, (_, program) = collected(), nano()
    found.check(program)
    with pytest.raises(UserError, match="of another graph"):
        found.check(tiny_program("tiny"))
    renamed = Statistics({(KEY[0], "layers.9.weight"): found[KEY]}, found.origin)
    with pytest.raises(UserError, match=r"has no text_decoder layers\.9\.weight"):
        renamed.check(program)
    with pytest.raises(UserError, match="no statistics of text_decoder's nothing"):
        found["text_decoder", "nothing"]
    inputs = {"text": moments(torch.ones(2, 7))}
    narrow = Statistics({KEY: replace(found[KEY], inputs=inputs)}, found.origin)
    with pytest.raises(UserError, match="reads 192 values and 7 there"):
        narrow.check(program)


def test_statistics_of_other_weights_are_refused() -> None:
    program = tiny_program("tiny")
    found = collect(load_model(Request("mobilevlm", "tiny")), program, open_samples("zoo", 1), hessians=False)
    found.check(program)
    with pytest.raises(UserError, match=r"other weights, random \(seed 0\)"):
        found.check(replace(program, weights=load_model(Request("mobilevlm", "tiny", seed=1)).weights))
