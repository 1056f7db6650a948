"""MobileVLM loaded through the public layout equals transformers' tower and decoder around the projector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.trace import trace
from tests.checkpoints import reference, write
from tests.numbers import relative_l2

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)

CASES: dict[str, dict[str, Any]] = {
    "v1": {},
    "v2": {"projector": "ldpnetv2", "vision": {"image_size": 96, "patch_size": 4}},
    "odd": {
        "vision": {
            "hidden_size": 40,
            "num_attention_heads": 5,
            "image_size": 50,
            "patch_size": 7,
            "num_hidden_layers": 2,
        },
        "text": {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 7, "vocab_size": 77},
    },
    "tied": {"text": {"tie_word_embeddings": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_independent_classes(case: str, tmp_path: Path) -> None:
    made = reference(**CASES[case])
    shards = 1 if case == "v1" else 3
    model = load_model(Request("mobilevlm", checkpoint=str(write(tmp_path / "c", made, shards, index=case != "odd"))))
    program = trace(model.architecture, model.weights)
    size = made.config["vision_config"]["image_size"]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, size, size), np.uint8))
    ids = torch.arange(3, 20)[None] % made.config["vocab_size"]
    with torch.no_grad():
        features = made.tower((pixels / 255 - MEAN) / STD, output_hidden_states=True).hidden_states[-2][:, 1:]
        expected_embeds = made.projector(features)
        image_embeds = program.module("vision_encoder")(pixels)
        assert relative_l2(image_embeds, expected_embeds) <= 1e-5
        assert image_embeds.shape[1] == model.architecture.visual_tokens
        words = program.module("token_embedding")(ids)
        assert relative_l2(words, made.decoder.get_input_embeddings()(ids)) <= 1e-6
        prompt = torch.cat([words, image_embeds], dim=1)[:, : model.architecture.context - 5]
        steps = torch.cat([prompt, words[:, :5]], dim=1)
        expected = made.decoder(inputs_embeds=steps).logits
        decoder = program.module("text_decoder")
        logits = [decoder(prompt, torch.arange(prompt.shape[1]))]
        logits += [decoder(words[:, s : s + 1], torch.tensor([prompt.shape[1] + s])) for s in range(5)]
    assert relative_l2(torch.cat(logits, dim=1), expected) <= 1e-5


def test_a_published_tower_may_be_named_instead_of_described() -> None:
    from graphs.architectures.mobilevlm import MobileVLM
    from graphs.components.vision.clip import CLIP_LARGE_336

    config = {**reference().config, "vision_config": None, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    assert MobileVLM.from_config(config).vision == CLIP_LARGE_336
    with pytest.raises(UserError, match="mm_vision_tower"):
        MobileVLM.from_config({**config, "mm_vision_tower": "openai/clip-vit-large-patch14-337"})


def test_pixel_statistics_are_the_preprocessors(tmp_path: Path) -> None:
    made = reference()
    directory = write(tmp_path, made)
    settings = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    (directory / "preprocessor_config.json").write_text(
        json.dumps({**settings, "image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    )
    model = load_model(Request("mobilevlm", checkpoint=str(directory)))
    program = trace(model.architecture, model.weights)
    pixels = model.architecture.image_processor(Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50))
    with torch.no_grad():
        features = made.tower((torch.from_numpy(pixels) / 255 - 0.5) / 0.25, output_hidden_states=True)
        expected = made.projector(features.hidden_states[-2][:, 1:])
        assert relative_l2(program.module("vision_encoder")(torch.from_numpy(pixels)), expected) <= 1e-5


def test_a_crop_that_the_tower_does_not_take_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path, reference())
    (directory / "preprocessor_config.json").write_text(json.dumps({"crop_size": 56}))
    with pytest.raises(UserError, match=r"crop_size is \(56, 56\); this tower takes pictures of 48 x 48"):
        load_model(Request("mobilevlm", checkpoint=str(directory)))


def test_tensors_at_fault_are_listed_by_name(tmp_path: Path) -> None:
    made = reference()
    made.tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(3, 3)
    made.tensors["model.layers.9.mlp.gate_proj.weight"] = torch.zeros(3, 3)
    del made.tensors["model.mm_projector.model.mlp.1.bias"]
    with pytest.raises(UserError) as caught:
        load_model(Request("mobilevlm", checkpoint=str(write(tmp_path, made))))
    message = str(caught.value)
    for name in ("layers.0.mlp.gate_proj.weight", "layers.9.mlp.gate_proj.weight", "mm_projector.model.mlp.1.bias"):
        assert name in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -48}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": "120"}, "vocab_size"),
        ({"hidden_size": 50}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"mm_projector_type": "ldpnetv3"}, "ldpnetv2"),
        ({"vision_config": {"hidden_size": 32}}, "vision_config"),
    ],
)
def test_absurd_dimensions_are_named(change: dict[str, Any], words: str) -> None:
    from graphs.architectures.mobilevlm import MobileVLM

    config = {key: value for key, value in {**reference().config, **change}.items() if value is not None}
    with pytest.raises(UserError, match=words):
        MobileVLM.from_config(config)
