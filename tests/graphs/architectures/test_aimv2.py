"""AIMv2 from checkpoints in both public layouts: transformers' features, embeddings and scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor
from transformers import Aimv2Config, Aimv2Model, Aimv2VisionConfig, Aimv2VisionModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.aimv2 import Aimv2
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.patched import PatchedProcessor
from graphs.preprocess.picture import from_json
from graphs.preprocess.text import padded
from graphs.preprocess.tokenizer import load_tokenizer
from graphs.trace import trace
from runtimes.base import Caller
from runtimes.eager import EagerRuntime
from runtimes.manifest import Bundle
from runtimes.session import open_runtime
from tests.lowered import lowers
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, photographs, randomized, save
from tests.published import counted

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
}
ODD: dict[str, Any] = {**VISION, "hidden_size": 40, "num_attention_heads": 5, "image_size": 50, "patch_size": 7}
ODD |= {"qkv_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 260,
    "max_position_embeddings": 24,
    "eos_token_id": 257,
}
TEXTS = ["a cat", "China, a roof", "", "a flower that is far too long to be read whole"]
PAIRS: dict[str, dict[str, Any]] = {
    "published shape": {"vision": VISION, "text": TEXT, "projection_dim": 24},
    "odd": {
        "vision": ODD,
        "text": {**TEXT, "qkv_bias": True, "mlp_bias": True, "num_attention_heads": 3},
        "projection_dim": 17,
        "max_logit_scale": 1.5,
    },
}


def pair(
    directory: Path, vision: dict[str, Any], text: dict[str, Any], **options: Any
) -> tuple[Aimv2Model, dict[str, Any]]:
    """A LiT model, and its processor's inputs from photographs and texts; both written into `directory`."""
    made = randomized(Aimv2Model(Aimv2Config(vision_config=vision, text_config=text, **options)))
    with torch.no_grad():
        made.logit_scale.fill_(0.9)  # beyond the odd case's bound, whose logarithm is 0.4
    side = vision["image_size"]
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    tokenizer = byte_tokenizer(pad_token="</s>")
    specials = [("<s>", 256), ("</s>", 257)]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    tokenizer.backend_tokenizer.post_processor = template
    processor = CLIPProcessor(images, tokenizer)
    processor.save_pretrained(directory)
    save(made, directory)
    inputs = processor(
        text=TEXTS, images=photographs(), padding="max_length", max_length=24, truncation=True, return_tensors="pt"
    )
    return made, dict(inputs)


def encoded(runtime: Caller, architecture: Aimv2, directory: Path) -> list[Tensor]:
    """Image embeddings, text embeddings and scores, from photographs and texts."""
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    assert architecture.text is not None
    length, pad = architecture.text.max_position_embeddings, architecture.text.pad_token_id
    pixels = [architecture.image_processor(photograph) for photograph in photographs()]
    images = np.concatenate([runtime.call("image_encoder", [one])[0] for one in pixels])
    ids = [padded(tokenizer, words, length, pad) for words in TEXTS]
    texts = np.concatenate([runtime.call("text_encoder", [one])[0] for one in ids])
    return [torch.from_numpy(array) for array in (images, texts, *runtime.call("similarity", [images, texts[:3]]))]


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_equal_transformers(case: str, tmp_path: Path) -> None:
    made, inputs = pair(tmp_path, **PAIRS[case])
    model = load_model(Request("aimv2", checkpoint=str(tmp_path)))
    assert isinstance(model.architecture, Aimv2)
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    with torch.no_grad():
        expected = made(**inputs)
        pooled = made.get_image_features(inputs["pixel_values"]).pooler_output
    images, texts, scores = encoded(runtime, model.architecture, tmp_path)
    assert relative_l2(images, pooled) <= 1e-5
    assert relative_l2(texts / texts.norm(dim=1, keepdim=True), expected.text_embeds) <= 1e-5
    assert relative_l2(scores, expected.logits_per_image[:, :3]) <= 1e-5


TOWERS: dict[str, dict[str, Any]] = {
    "features": {**VISION, "use_head": False},
    "head": ODD,
    "native": {**VISION, "use_head": False, "is_native": True},
    "native, head": {**ODD, "is_native": True},
}


@pytest.mark.parametrize("case", TOWERS)
def test_towers_equal_transformers(case: str, tmp_path: Path) -> None:
    made = randomized(Aimv2VisionModel(Aimv2VisionConfig(**TOWERS[case])))
    native, side = made.config.is_native, made.config.image_size
    square = {"height": side, "width": side}
    sizes = (
        {"size": {"shortest_edge": 60}, "do_center_crop": False} if native else {"size": square, "crop_size": square}
    )
    images = CLIPImageProcessorPil(**sizes)
    images.save_pretrained(tmp_path)
    model = load_model(Request("aimv2", checkpoint=str(save(made, tmp_path))))
    architecture = model.architecture
    assert isinstance(architecture, Aimv2)
    assert from_json(architecture.image_processor.to_json()) == architecture.image_processor
    runtime = EagerRuntime(trace(architecture, model.weights))
    lengths = set()
    whole = photographs()[0]
    for photograph in (whole, whole.crop((0, 0, 400, 400))):
        with torch.no_grad():
            expected = made(**images(photograph, return_tensors="pt"))
        arrays = architecture.image_processor.picture(photograph).arrays
        features, *pooled = map(torch.from_numpy, runtime.call("image_encoder", arrays))
        assert relative_l2(features, expected.last_hidden_state) <= 1e-5
        assert len(pooled) == made.config.use_head
        if pooled:
            assert relative_l2(pooled[0], expected.pooler_output) <= 1e-5
        lengths.add(features.shape[1])
    assert len(lengths) == 1 + native


def original(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that transformers wrote, as Apple writes them."""
    renames = [
        ("vision_model.", "image_encoder."),
        ("text_model.", "text_encoder."),
        ("visual_projection.", "image_projector."),
        ("text_projection.", "text_projector."),
        ("logit_scale", "log_logit_scale"),
        ("embeddings.patch_embed.", "preprocessor.patchifier.proj."),
        ("embeddings.rms_norm.", "preprocessor.patchifier.norm."),
        ("embeddings.token_embedding.", "preprocessor.text_embedding."),
        ("head.k_proj.", "head.k."),
        ("head.v_proj.", "head.v."),
        ("head.output_proj.", "head.linear."),
        ("encoder.layers.", "trunk.blocks."),
        (".rms_norm1.", ".norm_1."),
        (".rms_norm2.", ".norm_2."),
        (".ffn.gate_proj.", ".mlp.fc1."),
        (".ffn.down_proj.", ".mlp.fc2."),
        (".ffn.up_proj.", ".mlp.fc3."),
        ("attention.out_proj.", "attn.proj."),
        ("attention.q_proj.", "attn.qkv."),
    ]
    found = {}
    for name, tensor in tensors.items():
        key, value = name, tensor
        if "attention.q_proj." in name:
            value = torch.cat([tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        elif "attention.k_proj." in name or "attention.v_proj." in name:
            continue
        for ours, theirs in renames:
            key = key.replace(ours, theirs)
        if not key.startswith(("image_encoder.preprocessor", "text_encoder.preprocessor", "preprocessor")):
            key = key.replace("rms_norm.", "trunk.post_trunk_norm.")
        if "position_embedding." in key:
            pictures = "text_encoder" not in key
            place = "preprocessor.pos_embed" if pictures else "preprocessor.positional_embedding"
            key, value = key.replace("embeddings.position_embedding.weight", place), value[None] if pictures else value
        found[key] = value
    return found


@pytest.mark.parametrize("paired", [True, False])
def test_the_original_layout_holds_the_same(paired: bool, tmp_path: Path) -> None:
    if paired:
        made, _ = pair(tmp_path / "a", VISION, TEXT, projection_dim=24)
    else:
        made = randomized(Aimv2VisionModel(Aimv2VisionConfig(**TOWERS["features"])))
    made.save_pretrained(tmp_path / "a")
    tensors = original({name: tensor.clone() for name, tensor in made.state_dict().items()})
    assert not set(tensors) & set(made.state_dict())
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for section in (config["vision_config"], config["text_config"]) if paired else (config,):
        section["use_bias"] = section.pop("mlp_bias")
        section.pop("use_head", None)
    if paired:
        config["text_config"]["max_context_length"] = config["text_config"].pop("max_position_embeddings")
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    if (tmp_path / "a" / "processor_config.json").exists():
        (tmp_path / "b" / "processor_config.json").write_text((tmp_path / "a" / "processor_config.json").read_text())
    one, other = (load_model(Request("aimv2", checkpoint=str(tmp_path / name))) for name in "ab")
    assert isinstance(one.architecture, Aimv2)
    assert other.architecture == replace(one.architecture, original=True)
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_a_bundle_scores_as_transformers_does(tmp_path: Path) -> None:
    made, inputs = pair(tmp_path / "made", VISION, TEXT, projection_dim=24)
    request = Request("aimv2", checkpoint=str(tmp_path / "made"))
    bundle = Bundle.open(export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent))
    architecture = load_model(request).architecture
    assert isinstance(architecture, Aimv2)
    with torch.no_grad():
        expected = made(**inputs)
    _, _, scores = encoded(open_runtime(bundle), architecture, bundle.directory)
    assert relative_l2(scores, expected.logits_per_image[:, :3]) <= 1e-5


@pytest.mark.parametrize(
    ("target", "variant"),
    [("executorch", "tiny-native"), ("coreml", "tiny-native"), ("coreml", "tiny"), ("tensorrt", "tiny")],
)
def test_tiny_lowers(target: str, variant: str, tmp_path: Path) -> None:
    lowers(Request("aimv2", variant), target, tmp_path / "b")


def test_published_sizes_count() -> None:
    counted(Aimv2)


def test_absent_keys_are_transformers_defaults() -> None:
    found, expected = Aimv2.from_config({"vision_config": {}}), Aimv2Config()
    assert found.text is not None
    for ours, theirs in ((found.vision, expected.vision_config), (found.text, expected.text_config)):
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"):
            assert getattr(ours, key) == getattr(theirs, key)
    assert (found.text.projection_dim, found.max_scale) == (expected.projection_dim, expected.max_logit_scale)
    assert Aimv2.from_config({"hidden_size": 1024}).vision.use_head == Aimv2VisionConfig().use_head


def test_pictures_that_the_native_tower_does_not_take_are_refused() -> None:
    processor = PatchedProcessor(shortest_edge=None, crop_size=None, side=14, most=4)
    with pytest.raises(UserError, match="a picture of 30 x 13: this model takes sides of 14 to 56 pixels"):
        processor(photographs()[0].resize((30, 13)))
    with pytest.raises(UserError, match="a picture of 70 x 30"):
        processor(photographs()[0].resize((70, 30)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"vision_config": {"use_head": False}}, "use_head is false"),
        ({"vision_config": {"is_native": True}}, "is_native is true"),
        ({"hidden_size": 1001}, "num_attention_heads 8"),
        ({"hidden_size": 1000, "patch_size": 225}, "patch_size 225"),
        ({"hidden_size": 1022, "num_attention_heads": 7, "is_native": True}, "no multiple of 4"),
        ({"hidden_size": 1024, "hidden_act": "swiglu"}, "silu"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Aimv2.from_config(config)
