"""Statistics of the traced program against hooks on the modules it was traced from, and what samples contribute."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from calibration.collect import collect
from calibration.reading import Sample, Samples
from calibration.samples import open_samples, zoo_samples
from graphs.errors import UserError
from graphs.model import Request, load_model
from tests.calibration.nano import COUNT, SEED, collected, nano, run
from tests.tiny import tiny_program
from zoo.packing import Encoder

VISION = ("vision_encoder.tower.layers.1.mlp.fc1", "vision_encoder.projector.mb_block.1.block.0.0")
DECODER = ("text_decoder.layers.2.self_attn.o_proj", "text_decoder.layers.1.mlp.down_proj", "text_decoder.lm_head")
STEPS = 4


@cache
def hooked() -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]], list[Tensor]]:
    """What layers of the eager modules read and write, in rows, and which rows are images.

    Each sample is one pass over prompt and answer, which must equal a prefill and steps; the zoo's own encoder, written
    for training, makes the ids.
    """
    model, _ = nano()
    root = model.architecture.build().eval()
    root.load_state_dict({name: model.weights[name] for name, _ in root.named_parameters()}, strict=False)
    assert model.directory is not None
    encoder = Encoder(Tokenizer.from_file(str(model.directory / "tokenizer.json")))
    inputs: dict[str, list[Tensor]] = {name: [] for name in (*VISION, *DECODER)}
    outputs: dict[str, list[Tensor]] = {name: [] for name in inputs}

    def rows(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(0, 2) if x.ndim == 4 else x.flatten(0, 1)

    for name in inputs:

        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
            inputs[name].append(rows(args[0]))
            outputs[name].append(rows(output))

        root.get_submodule(name).register_forward_hook(hook)
    images = []
    for sample in islice(zoo_samples(COUNT, SEED, "train"), COUNT):
        with torch.no_grad():
            image = root.vision_encoder(torch.from_numpy(model.architecture.image_processor(sample.image)))
            before = encoder.before
            after = encoder.question(sample.question) + encoder.answer(str(sample.answer))[:-1][:STEPS]
            text = [root.token_embedding(torch.tensor([ids])) for ids in (before, after)]
            embeds = torch.cat([text[0], image, text[1]], dim=1)
            root.text_decoder(embeds, torch.arange(embeds.shape[1]))
        is_image = torch.zeros(embeds.shape[1], dtype=torch.bool)
        is_image[len(before) : len(before) + image.shape[1]] = True
        images.append(is_image)
    return inputs, outputs, images


@pytest.mark.parametrize("name", [*VISION, *DECODER])
def test_moments_are_those_of_hooks(name: str) -> None:
    inputs, outputs, images = hooked()
    method, _, layer = name.partition(".")
    found = collected()[method, f"{layer}.weight"]
    read, wrote = torch.cat(inputs[name]), torch.cat(outputs[name])
    is_image = torch.cat(images) if method == "text_decoder" else torch.ones(len(read), dtype=torch.bool)
    assert set(found.inputs) == ({"image", "text"} if method == "text_decoder" else {"image"})
    for modality, moments in found.inputs.items():
        rows = read[is_image == (modality == "image")]
        assert moments.count == len(rows)
        torch.testing.assert_close(moments.minimum, rows.amin(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.maximum, rows.amax(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.sum_abs, rows.abs().sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.sum_square, rows.square().sum(0), rtol=1e-4, atol=1e-4)
        expected = rows.T.double() @ rows.double()
        if moments.hessian is not None:
            assert (moments.hessian - expected).norm() < 1e-5 * expected.norm()
        assert (moments.hessian is None) == ("block" in name)  # convolutions have none
        assert len(moments.rows) == min(64, len(rows))
        nearest = (moments.rows[:, None] - rows[None]).abs().amax(-1).amin(-1)
        assert nearest.max() < 1e-3  # each kept row is one that was read
    torch.testing.assert_close(found.outputs.minimum, wrote.amin(0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.outputs.maximum, wrote.amax(0), rtol=1e-4, atol=1e-3)
    assert found.outputs.rows.shape == (32, wrote.shape[1])


def test_every_linear_layer_and_convolution_is_there_once() -> None:
    found = collected()
    model, _ = nano()
    root = model.architecture.build()
    layers = {
        (name.partition(".")[0], f"{name.partition('.')[2]}.weight")
        for name, module in root.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    assert set(found) == layers
    attention = [
        found["text_decoder", f"layers.0.self_attn.{part}_proj.weight"].inputs for part in ("q", "k", "v", "o")
    ]
    assert attention[0] is attention[1] is attention[2]
    assert attention[0] is not attention[3]


def test_the_origin_says_what_was_seen() -> None:
    origin, (_, _, images) = collected().origin, hooked()
    assert (origin.data, origin.count, origin.images, origin.seed, origin.skipped) == ("zoo", COUNT, COUNT, SEED, 0)
    assert origin.tokens == {"image": sum(int(i.sum()) for i in images), "text": sum(int((~i).sum()) for i in images)}
    assert origin.tokens["image"] == COUNT * nano()[0].architecture.facts()["visual_tokens"]
    assert (origin.model, origin.weights) == ("mobilevlm", "zoo:mobilevlm-nano")


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, statistics in (("a", collected()), ("b", run())):
        statistics.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_greedy_steps_and_text_alone() -> None:
    """Without an answer the model's own is followed until its end; without pictures the vision encoder is not seen."""
    model, program = nano()
    sample = next(zoo_samples(1, SEED, "train"))
    answer = collect(model, program, [sample], hessians=False, decode_steps=STEPS)
    greedy = collect(model, program, [replace(sample, answer=None)], hessians=False, decode_steps=STEPS)
    assert answer.origin.tokens == greedy.origin.tokens  # the trained model's tokens are the answer's
    torch.testing.assert_close(
        greedy["text_decoder", "lm_head.weight"].inputs["text"].sum_abs,
        answer["text_decoder", "lm_head.weight"].inputs["text"].sum_abs,
    )
    assert all(moments.hessian is None for layer in greedy.values() for moments in layer.inputs.values())

    alone = collect(model, program, [Sample(None, "How many?")], hessians="lm_head", decode_steps=0)
    assert alone.origin.images == alone.origin.tokens["image"] == 0
    assert {method for method, _ in alone} == {"text_decoder"}
    assert {key[1] for key, layer in alone.items() if layer.inputs["text"].hessian is not None} == {"lm_head.weight"}
    with pytest.raises(UserError, match=r"no statistics of vision_encoder.*no pictures"):
        alone["vision_encoder", "tower.layers.0.mlp.fc1.weight"]


def test_prompts_that_do_not_fit_are_skipped() -> None:
    model, program = nano()
    sample = next(zoo_samples(1, SEED, "train"))
    long, placed = (replace(sample, question=text) for text in ("why? " * 500, "<image> or <image>?"))
    samples = Samples.of([long, sample, placed])
    samples.count = 1
    found = collect(model, program, samples, hessians=False)
    assert (found.origin.count, found.origin.skipped) == (1, 1)
    assert "no room in the context" in found.origin.skipped_names[0]
    with pytest.raises(UserError, match=r"1 good samples, at least 3 are needed; 2 were unreadable"):
        collect(model, program, [long, sample, placed], hessians=False)


def test_random_weights_need_no_tokenizer() -> None:
    model = load_model(Request("mobilevlm", "tiny"))
    found = collect(model, tiny_program("tiny"), open_samples("zoo", 2))
    assert found.origin.tokens["image"] == 2 * 9
    assert found.origin.weights == "random (seed 0)"


def test_a_disk_without_room_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: full)
    with pytest.raises(UserError, match=rf"{tmp_path} has 1 MiB free, statistics of this model take \d+ MiB or more"):
        collect(*nano(), open_samples("zoo", 1), out=tmp_path / "new" / "statistics.safetensors")
    assert not list(tmp_path.iterdir())
