import json

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPVisionConfig, CLIPVisionModel

from graphs.checkpoint import Checkpoint
from graphs.model import Request, load_model
from zoo.baselines import Baselines, share
from zoo.evaluate import CHECKPOINT, answer, table
from zoo.examples import FOLDER
from zoo.layout import TOWER
from zoo.nano import Nano
from zoo.packing import pixels
from zoo.scenes import samples

#: the promise of the zoo, checked on few samples here and on many by zoo.evaluate
FLOOR_ALL = 0.9
MAX_BYTES = 12_000_000


def test_heldout_accuracy() -> None:
    asked = list(samples("heldout", 105, seed=21))
    answers = answer(CHECKPOINT, asked)
    assert share(s.answer == a for s, a in zip(asked, answers, strict=True)) >= FLOOR_ALL
    rows = table(asked, answers, Baselines.count(scenes=600))
    everything = rows[-1]
    assert everything.count == 105
    assert everything.text_only < 0.35  # what not looking gives
    assert everything.exact > 2 * everything.text_only


def test_recorded_accuracy_keeps_the_promise() -> None:
    lines = (CHECKPOINT.parent.parent / "docs" / "zoo.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "%" in line]
    exact = {row[0]: float(row[2].rstrip("%")) for row in cells}
    assert len(exact) == 8
    assert exact.pop("all") >= 90
    assert min(exact.values()) >= 80


def test_it_is_small_and_complete() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= MAX_BYTES
    model = load_model(Request("mobilevlm"))
    assert model.variant == CHECKPOINT.name
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118


def test_a_stock_clip_loads_the_tower_and_sees_the_same() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())["vision_config"]
    stock = CLIPVisionModel(CLIPVisionConfig(**{k: v for k, v in config.items() if k != "model_type"})).eval()
    checkpoint = Checkpoint.open(CHECKPOINT)
    prefix = TOWER.removesuffix("vision_model.")
    held = {n.removeprefix(prefix): checkpoint.tensor(n).float() for n in checkpoint.names() if n.startswith(prefix)}
    wanted = set(stock.state_dict())
    if not any(name.startswith("vision_model.") for name in wanted):
        held = {name.removeprefix("vision_model."): value for name, value in held.items()}
    assert set(held) == wanted - {name for name in wanted if name.endswith("position_ids")}
    stock.load_state_dict(held, strict=False)

    nano = Nano.load(CHECKPOINT)
    raw = pixels(next(samples("heldout", 1, 3)).image)[None]
    with torch.no_grad():
        _, ours, _ = nano.see(raw)
        normal = nano.root.get_submodule("vision_encoder").normalize(raw)
        theirs = stock(normal, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


def test_examples_name_pictures_that_are_there() -> None:
    rows = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text().splitlines()]
    assert len(rows) > 30
    assert {row["task"] for row in rows} == {"color", "shape", "count", "position", "digits", "words", "caption"}
    assert {row["image"] for row in rows} == {path.name for path in FOLDER.glob("*.png")}


@pytest.mark.parametrize("name", ["config", "preprocessor_config", "tokenizer_config", "generation_config", "training"])
def test_documents_are_json(name: str) -> None:
    assert isinstance(json.loads((CHECKPOINT / f"{name}.json").read_text()), dict)
