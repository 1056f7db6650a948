"""CLIP, MetaCLIP and SigLIP from checkpoints that transformers' classes wrote: the same embeddings and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, SiglipConfig, SiglipModel, SiglipProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.clip import Clip
from graphs.architectures.metaclip import MetaClip
from graphs.architectures.siglip import Siglip
from graphs.components.dual import DualEncoder
from graphs.components.text.clip import CLIP_TEXT, SIGLIP_TEXT
from graphs.components.vision.clip import CLIP_BASE_32, SIGLIP_BASE_16
from graphs.errors import UserError
from graphs.model import Request, load_model
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
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 260,
    "max_position_embeddings": 24,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
ODD_VISION = {**VISION, "hidden_size": 40, "num_attention_heads": 5, "image_size": 50, "patch_size": 7}
TEXTS = ["a cat", "China, a roof", "", "a flower that is far too long to be read whole"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("clip", {"projection_dim": 24}),
    "clip, odd": (
        "clip",
        {
            "vision_config": {**ODD_VISION, "hidden_act": "gelu"},
            "text_config": {**TEXT, "hidden_size": 36, "num_attention_heads": 3, "layer_norm_eps": 1e-3},
            "projection_dim": 17,
        },
    ),
    "clip, highest id ends": ("clip", {"text_config": {**TEXT, "eos_token_id": 2, "pad_token_id": 0}}),
    "metaclip": ("metaclip", {"projection_dim": 24}),
    "siglip": ("siglip", {}),
    "siglip, odd": (
        "siglip",
        {"vision_config": ODD_VISION, "text_config": {**TEXT, "hidden_size": 48, "projection_size": 40}},
    ),
}
CLASSES = {
    "clip": (CLIPModel, CLIPConfig, CLIPProcessor, CLIPImageProcessorPil),
    "metaclip": (CLIPModel, CLIPConfig, CLIPProcessor, CLIPImageProcessorPil),
    "siglip": (SiglipModel, SiglipConfig, SiglipProcessor, SiglipImageProcessorPil),
}


def reference(system: str, options: dict[str, Any], directory: Path) -> tuple[Any, dict[str, Any]]:
    """A model, and its processor's inputs from photographs and texts; both written into `directory`."""
    model_class, config_class, processor_class, images_class = CLASSES[system]
    sections: dict[str, Any] = {"vision_config": VISION, "text_config": TEXT}
    made = randomized(model_class(config_class(**{**sections, **options})))
    side = made.config.vision_config.image_size
    square = {"height": side, "width": side}
    sizes = {"size": square} if system == "siglip" else {"size": {"shortest_edge": side}, "crop_size": square}
    tokenizer = byte_tokenizer(pad_token="<pad>" if made.config.text_config.pad_token_id else "!")
    begin = {"single": "$A </s>"} if system == "siglip" else {"single": "<s> $A </s>"}
    specials = [("<s>", 256), ("</s>", 257)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**begin, special_tokens=specials)
    processor = processor_class(images_class(**sizes), tokenizer)
    processor.save_pretrained(directory)
    save(made, directory)
    inputs = processor(
        text=TEXTS, images=photographs(), padding="max_length", max_length=24, truncation=True, return_tensors="pt"
    )
    if system == "siglip":
        inputs.pop("attention_mask", None)  # its texts are read whole, padding included
    return made, dict(inputs)


def encoded(runtime: Caller, architecture: DualEncoder, directory: Path) -> list[np.ndarray]:
    """Image embeddings, text embeddings and scores, from photographs and texts."""
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    text = architecture.text
    pixels = [architecture.image_processor(photograph) for photograph in photographs()]
    ids = [padded(tokenizer, words, text.max_position_embeddings, text.pad_token_id) for words in TEXTS]
    images = np.concatenate([runtime.call("image_encoder", [one])[0] for one in pixels])
    texts = np.concatenate([runtime.call("text_encoder", [one])[0] for one in ids])
    return [images, texts, *runtime.call("similarity", [images, texts[:3]])]


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    system, options = CASES[case]
    made, inputs = reference(system, options, tmp_path)
    model = load_model(Request(system, checkpoint=str(tmp_path)))
    assert isinstance(model.architecture, DualEncoder)
    with torch.no_grad():
        expected = made(**inputs)
        pooled = made.get_image_features(inputs["pixel_values"]).pooler_output
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    images, texts, scores = map(torch.from_numpy, encoded(runtime, model.architecture, tmp_path))
    assert relative_l2(images, pooled) <= 1e-5
    assert relative_l2(texts / texts.norm(dim=1, keepdim=True), expected.text_embeds) <= 1e-5
    assert scores.shape == (4, 3)
    assert relative_l2(scores, expected.logits_per_image[:, :3]) <= 1e-5


@pytest.mark.parametrize(("system", "target"), [("clip", "onnxruntime"), ("siglip", "executorch")])
def test_bundles_score_as_transformers_does(system: str, target: str, tmp_path: Path) -> None:
    made, inputs = reference(system, {"projection_dim": 24} if system == "clip" else {}, tmp_path / "made")
    request = Request(system, checkpoint=str(tmp_path / "made"))
    options = ExportOptions(request, target, "reference-fp32", out=tmp_path / "b")
    bundle = Bundle.open(export(options, silent))
    assert bundle.manifest["prompt"]["template"] is None
    assert bundle.manifest["tokens"] == {"before": None, "after": None}
    architecture = load_model(request).architecture
    assert isinstance(architecture, DualEncoder)
    scores = encoded(open_runtime(bundle), architecture, bundle.directory)[2]
    with torch.no_grad():
        assert relative_l2(torch.from_numpy(scores), made(**inputs).logits_per_image[:, :3]) <= 1e-4


@pytest.mark.parametrize(("system", "target"), [("siglip", "coreml"), ("clip", "tensorrt"), ("clip", "coreml")])
def test_tiny_lowers(system: str, target: str, tmp_path: Path) -> None:
    manifest = lowers(Request(system, "tiny"), target, tmp_path / "b")
    assert set(manifest["methods"]) == {"image_encoder", "text_encoder", "similarity"}


@pytest.mark.parametrize("system", [Clip, MetaClip, Siglip])
def test_published_sizes_count(system: type[DualEncoder]) -> None:
    counted(system)


def test_metaclip_is_clip_up_to_configuration() -> None:
    """Its paper changes the data alone, and its hub files name CLIPModel."""
    assert MetaClip.from_config({}).build().state_dict().keys() == Clip.from_config({}).build().state_dict().keys()
    assert all(variant.architecture.vision.hidden_act == "quick_gelu" for variant in MetaClip.variants())  # type: ignore[attr-defined]


def test_absent_keys_are_transformers_defaults() -> None:
    for found, vision, text, config in (
        (Clip.from_config({}), CLIP_BASE_32, CLIP_TEXT, CLIPConfig()),
        (Siglip.from_config({}), SIGLIP_BASE_16, SIGLIP_TEXT, SiglipConfig()),
    ):
        assert (found.vision, found.text) == (vision, text)
        for ours, theirs in ((vision, config.vision_config), (text, config.text_config)):
            for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps"):
                assert getattr(ours, key) == getattr(theirs, key)


def test_the_first_published_files_repeat_their_sections() -> None:
    config = {"text_config": {"eos_token_id": 2, "hidden_size": 512}, "text_config_dict": {"hidden_size": 768}}
    found, expected = Clip.from_config(config).text, CLIPConfig(**config).text_config
    assert (found.hidden_size, found.eos_token_id, found.pool) == (768, 49407, "end")
    assert (expected.hidden_size, expected.eos_token_id) == (768, 49407)


def test_towers_of_two_spaces_are_refused() -> None:
    with pytest.raises(UserError, match="texts are 512 wide"):
        Siglip.from_config({"text_config": {"projection_size": 512}})
    with pytest.raises(UserError, match="vision_use_head is false"):
        Siglip.from_config({"vision_config": {"vision_use_head": False}})
