"""Random checkpoints: the public layout, read back as any other checkpoint is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphs.errors import UserError
from graphs.model import Request, load_model, parameter_shapes
from graphs.registry import variant
from graphs.safetensors_io import read_header
from zoo.random_checkpoint import write


@pytest.mark.parametrize(("model", "size"), [("mobilevlm", "tiny"), ("mobilevlm", "tiny-v2"), ("llava_1_5", "tiny")])
def test_it_loads_as_what_was_asked_for(model: str, size: str, tmp_path: Path) -> None:
    wanted = variant(model, size).architecture
    files = write(tmp_path / "a", variant(model, size), shard_bytes=200_000)
    assert len(files) > 1
    assert (tmp_path / "a" / "model.safetensors.index.json").is_file()
    loaded = load_model(Request(model, checkpoint=str(tmp_path / "a")))
    assert parameter_shapes(loaded.architecture) == parameter_shapes(wanted)
    stored = {
        name: entry for file in files if file.suffix == ".safetensors" for name, entry in read_header(file).items()
    }
    assert {entry.dtype for entry in stored.values()} == {torch.float16}
    layers = {name.split("encoder.layers.")[1].split(".")[0] for name in stored if "encoder.layers." in name}
    assert len(layers) == wanted.vision.num_hidden_layers  # type: ignore[attr-defined]  # those that no graph reads, too
    for name in list(parameter_shapes(wanted))[::7]:
        value = loaded.weights[name]
        assert value.isfinite().all()
        assert value.std() > 0 or value.unique().numel() == 1  # norms begin at one


def test_the_seed_and_the_name_decide(tmp_path: Path) -> None:
    wanted = variant("mobilevlm", "tiny")
    first, again, other = (write(tmp_path / name, wanted, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first[0].read_bytes() == again[0].read_bytes() != other[0].read_bytes()


def test_other_models_go_by_our_names(tmp_path: Path) -> None:
    write(tmp_path / "x", variant("qwen2_vl", "tiny"))
    loaded = load_model(Request("qwen2_vl", checkpoint=str(tmp_path / "x"), max_context=64))
    drawn = load_model(Request("qwen2_vl", "tiny", max_context=64))
    assert loaded.architecture == drawn.architecture
    assert loaded.weights.keys() == drawn.weights.keys()
    assert all(torch.equal(loaded.weights[name], drawn.weights[name].half().float()) for name in drawn.weights)
    with pytest.raises(UserError, match="missing"):
        load_model(Request("florence2", checkpoint=str(tmp_path / "x")))
    (tmp_path / "x" / "config.json").write_text('{"vlmx_variant": "tinier"}')
    with pytest.raises(UserError, match="unknown variant 'tinier' of qwen2_vl"):
        load_model(Request("qwen2_vl", checkpoint=str(tmp_path / "x")))
