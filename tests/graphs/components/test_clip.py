"""The CLIP tower against transformers' on shared random weights."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from graphs.components.vision.clip import ClipVisionConfig, ClipVisionTower
from tests.numbers import relative_l2


@pytest.mark.parametrize(
    ("image_size", "patch_size", "act", "select"), [(48, 8, "quick_gelu", -2), (50, 7, "gelu", -1)]
)
def test_equals_transformers(image_size: int, patch_size: int, act: str, select: int) -> None:
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_act": act,
    }
    torch.manual_seed(0)
    reference = CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.2)
    tower = ClipVisionTower(ClipVisionConfig(**sizes), select).eval()
    public = {name.removeprefix("vision_model."): tensor for name, tensor in reference.state_dict().items()}
    tower.load_state_dict(
        {name: public[name if not name.startswith("layers.") else f"encoder.{name}"] for name in tower.state_dict()}
    )
    pixels = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True).hidden_states[select][:, 1:]
        actual = tower(pixels)
    assert actual.shape == (2, (image_size // patch_size) ** 2, 48)
    assert relative_l2(actual, expected) <= 1e-5


def test_builds_only_the_layers_it_uses() -> None:
    config = ClipVisionConfig(16, 32, 5, 2, 16, 8)
    assert len(ClipVisionTower(config, -2).layers) == 4
    assert len(ClipVisionTower(config, -1).layers) == 5
