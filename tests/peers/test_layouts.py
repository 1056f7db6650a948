"""Our checkpoint in the peers' layouts: every tensor has a name there, and queries keep their meaning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from graphs import registry
from peers.checkpoint import Checkpoint, made_up
from peers.executorch.checkpoint import meta_name, parameters
from peers.llama_cpp.names import TEXT_NAMES, interleaved, renamed, text_tensor, vision_name, vision_tensor
from peers.text_checkpoint import write
from zoo.random_checkpoint import write as write_random


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_random(directory, registry.variant("mobilevlm", "tiny"), shard_bytes=1 << 17)
    return Checkpoint(directory)


def test_every_tensor_has_one_name_in_one_of_the_two_gguf_files(checkpoint: Checkpoint) -> None:
    text = {name: renamed(name, TEXT_NAMES) for name in checkpoint.text()}
    assert None not in text.values()
    layers = checkpoint.config["num_hidden_layers"]
    assert len(set(text.values())) == len(text) == 3 + 9 * layers
    vision = {name: vision_name(name, 2) for name in checkpoint.files if name not in text}
    left_out = sorted(name.split("vision_model.")[1] for name, theirs in vision.items() if theirs is None)
    assert all(name.startswith(("encoder.layers.2.", "post_layernorm.")) for name in left_out)
    assert len(left_out) == 16 + 2
    named = [theirs for theirs in vision.values() if theirs]
    assert len(set(named)) == len(named)
    assert "v.blk.1.ffn_up.weight" in named
    assert "mm.model.mb_block.1.block.1.fc2.bias" in named


def test_rotating_neighbours_after_interleaving_is_rotating_halves_before() -> None:
    heads, width = 4, 16
    draw = np.random.default_rng(0)
    weight, x = draw.standard_normal((heads * width, 24)), draw.standard_normal(24)
    angle = draw.standard_normal(width // 2)
    cos, sin = np.cos(angle), np.sin(angle)
    halves = (weight @ x).reshape(heads, 2, width // 2)
    first, second = halves[:, 0], halves[:, 1]
    expected = np.stack([first * cos - second * sin, second * cos + first * sin], 1).reshape(heads, width)
    pairs = (interleaved(weight, heads) @ x).reshape(heads, width // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = np.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    assert np.allclose(rotated[..., 0], expected[:, : width // 2])
    assert np.allclose(rotated[..., 1], expected[:, width // 2 :])


def test_layouts_of_single_tensors(checkpoint: Checkpoint) -> None:
    norm = "model.layers.0.input_layernorm.weight"
    assert text_tensor(norm, checkpoint[norm], 4, 2).dtype == "float32"
    key = "model.layers.0.self_attn.k_proj.weight"
    turned = text_tensor(key, checkpoint[key], 4, 2)
    assert turned.shape == checkpoint[key].shape
    assert np.array_equal(turned[1], checkpoint[key][turned.shape[0] // 4])
    gate = "model.mm_projector.model.mb_block.1.block.1.fc1.weight"
    assert vision_tensor(gate, checkpoint[gate]).shape == checkpoint.shape(gate)[:2]


def test_names_of_meta(checkpoint: Checkpoint) -> None:
    names = [meta_name(name) for name in checkpoint.text()]
    assert len(set(names)) == len(names)
    assert {"tok_embeddings.weight", "norm.weight", "output.weight", "layers.1.feed_forward.w3.weight"} <= set(names)
    assert {"layers.0.attention.wo.weight", "layers.0.attention_norm.weight", "layers.0.ffn_norm.weight"} <= set(names)
    assert parameters(checkpoint.config)["hidden_dim"] == checkpoint.config["intermediate_size"]


def test_the_text_checkpoint_is_a_llama_that_transformers_reads(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write(tmp_path, checkpoint)
    assert all(path.is_symlink() for path in tmp_path.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert type(model).__name__ == "LlamaForCausalLM"
    state = model.state_dict()
    assert set(state) == set(checkpoint.text())
    assert all(np.array_equal(state[name].numpy(), checkpoint[name]) for name in state)
    size = checkpoint.config["vocab_size"]
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == size
    assert len(set(made_up(size))) == size
    assert "mm_vision_tower" not in json.loads((tmp_path / "config.json").read_text())
