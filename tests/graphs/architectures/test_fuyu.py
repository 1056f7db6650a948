"""Fuyu and OtterHD from checkpoints that transformers' class wrote: the same patches, logits, tokens and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import FuyuConfig, FuyuForCausalLM, FuyuProcessor, PreTrainedTokenizerFast
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.fuyu_8b import Fuyu
from graphs.architectures.otterhd import OtterHD
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.padded_raster import PaddedRasterProcessor
from graphs.preprocess.prompt import read
from graphs.preprocess.tokenizer import load_tokenizer
from graphs.trace import build_fake, trace
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.lowered import lowers
from tests.numbers import relative_l2
from tests.pretrained import photographs, randomized, save
from tests.published import counted

LETTERS = [chr(code) for code in range(33, 127)]
WORDS = ["<unk>", "<s>", "</s>", "▁", "|SPEAKER|", "|NEWLINE|", "<0x04>", *LETTERS]
TEXT: dict[str, Any] = {
    "model_type": "persimmon",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5},
}
CASES: dict[str, dict[str, Any]] = {
    "published shape": {},
    "odd": {
        "text": {
            **TEXT,
            "hidden_size": 60,
            "num_attention_heads": 3,
            "qk_layernorm": False,
            "layer_norm_eps": 1e-3,
            "hidden_act": "gelu",
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 300.0,
                "partial_rotary_factor": 0.3,
            },
        },
        "side": 5,
        "bounds": (20, 45),
        "tie_word_embeddings": True,
    },
}


class Images(FuyuImageProcessorPil):
    """The processor of pictures, whose last step takes arrays and is given tensors."""

    def patchify_image(self, image: Any, patch_size: Any = None) -> Any:
        return torch.from_numpy(super().patchify_image(image.numpy(), patch_size))


def tokenizer() -> PreTrainedTokenizerFast:
    """As Fuyu's: a space is put before every text, and the tokens of pictures are words among others."""
    found = Tokenizer(models.Unigram([(word, -9.0 if word in LETTERS else -1.0) for word in WORDS], unk_id=0))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def reference(
    directory: Path,
    text: dict[str, Any] = TEXT,
    side: int = 6,
    bounds: tuple[int, int] = (30, 42),
    tie_word_embeddings: bool = False,
) -> tuple[FuyuForCausalLM, FuyuProcessor]:
    """A model and its processor, both written into `directory`."""
    config = FuyuConfig(
        patch_size=side, text_config=text, image_token_id=4, tie_word_embeddings=tie_word_embeddings, eos_token_id=2
    )
    made = randomized(FuyuForCausalLM(config))
    images = Images(size={"height": bounds[0], "width": bounds[1]}, patch_size={"height": side, "width": side})
    words = tokenizer()
    words.save_pretrained(directory)
    save(made, directory)
    images.save_pretrained(directory)
    return made, FuyuProcessor(images, words)


def flattened(patches: np.ndarray[Any, Any]) -> Tensor:
    """Raw patches [N, 3, S, S] as transformers' processor gives them, normalised, channels of a pixel side by side."""
    return ((torch.from_numpy(patches).double() / 255 - 0.5) / 0.5).permute(0, 2, 3, 1).flatten(1)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path, **CASES[case])
    model = load_model(Request("fuyu_8b", checkpoint=str(tmp_path)))
    architecture = model.architecture
    assert isinstance(architecture, Fuyu)
    runtime = EagerRuntime(trace(architecture, model.weights))
    words = load_tokenizer(tmp_path)
    assert words is not None
    counts = set()
    with torch.no_grad():
        for photograph in photographs():
            seen = architecture.image_processor.picture(photograph)
            given = processor(text="Hm? Yes", images=photograph, return_legacy_image_output=False, return_tensors="pt")
            assert relative_l2(flattened(seen.arrays[0]), given["pixel_values"]) <= 1e-6
            (image_embeds,) = runtime.call("vision_encoder", seen.arrays)
            features = made.model.get_image_features(given["pixel_values"].float()).last_hidden_state
            assert relative_l2(torch.from_numpy(image_embeds[0]), features) <= 1e-5
            segments = read(architecture.template, "Hm? Yes", [seen], words)
            ids = given["input_ids"]
            expected = made.generate(
                ids, pixel_values=given["pixel_values"].float(), do_sample=False, max_new_tokens=5, eos_token_id=None
            )
            *_, last = generate(runtime, segments, context=architecture.context, max_new_tokens=5)
            assert last.prompt_tokens == ids.shape[1]
            assert last.tokens == expected[0, ids.shape[1] :].tolist()
            embeds = runtime.call("token_embedding", [ids.numpy()])[0]
            embeds[0, (ids[0] == 4).numpy()] = image_embeds[0]
            runtime.reset()
            (logits,) = runtime.call("text_decoder", [embeds, np.arange(ids.shape[1])])
            wanted = made(ids, pixel_values=given["pixel_values"].float()).logits
            assert relative_l2(torch.from_numpy(logits), wanted) <= 1e-5
            counts.add(len(features))
        assert len(counts) > 2
        ids = words.encode("No picture at all")
        runtime.reset()
        embeds = runtime.call("token_embedding", [np.array([ids])])[0]
        (logits,) = runtime.call("text_decoder", [embeds, np.arange(len(ids))])
        assert relative_l2(torch.from_numpy(logits), made(torch.tensor([ids])).logits) <= 1e-5


def test_other_public_layouts_hold_the_same(tmp_path: Path) -> None:
    """The one of today's classes in memory; and a configuration that is flat, as the one on the hub."""
    made, _ = reference(tmp_path / "a")
    made.save_pretrained(tmp_path / "a", max_shard_size="1GB")
    (tmp_path / "b").mkdir()
    rules = [
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.", "model.language_model."),
        ("vision_embed_tokens.", "model.vision_embed_tokens."),
    ]
    renamed = {}
    for name, tensor in made.state_dict().items():
        assert any(name.startswith(theirs) for _, theirs in rules)
        renamed[name] = tensor.clone()
    save_file(renamed, tmp_path / "b" / "model.safetensors")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    flat = {**config.pop("text_config"), **config, "rope_theta": 25000.0, "text_model_type": "persimmon"}
    del flat["rope_parameters"]
    (tmp_path / "b" / "config.json").write_text(json.dumps(flat))
    (tmp_path / "b" / "preprocessor_config.json").write_text((tmp_path / "a" / "preprocessor_config.json").read_text())
    one, other = (load_model(Request("fuyu_8b", checkpoint=str(tmp_path / name))) for name in "ab")
    assert not set(load_file(tmp_path / "a" / "model.safetensors")) & set(renamed)
    assert one.architecture == other.architecture
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


@pytest.mark.parametrize(("system", "target"), [("fuyu_8b", "onnxruntime"), ("otterhd", "executorch")])
def test_bundles_answer_as_transformers_does(system: str, target: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path / "made")
    request = Request(system, checkpoint=str(tmp_path / "made"), max_context=128)
    bundle = export(ExportOptions(request, target, "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    prompt = "Hm?" if system == "fuyu_8b" else "User: Hm? Assistant:"
    for picture in photographs()[:3]:
        answer, _ = session.answer("Hm?", [picture], max_new_tokens=8)
        given = processor(text=prompt, images=picture, return_legacy_image_output=False, return_tensors="pt")
        ids, pixels = given["input_ids"], given["pixel_values"].float()
        tokens = made.generate(ids, pixel_values=pixels, do_sample=False, max_new_tokens=8)
        assert answer == processor.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("target", ["coreml", "tensorrt"])
def test_tiny_lowers(target: str, tmp_path: Path) -> None:
    lowers(Request("fuyu_8b", "tiny"), target, tmp_path / "b")


def test_published_sizes_count() -> None:
    for variant in counted(Fuyu, OtterHD):
        assert isinstance(variant.architecture, Fuyu)
        assert variant.architecture.visual_tokens == 36 * 64


def test_otterhd_is_fuyu_up_to_its_weights() -> None:
    """Its paper trains Fuyu on; its hub files name FuyuForCausalLM."""
    mine, theirs = (build_fake(system.from_config({})) for system in (OtterHD, Fuyu))
    assert {name: value.shape for name, value in mine.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    assert OtterHD.from_config({}).text == Fuyu.from_config({}).text
    assert OtterHD.from_config({}).template.render("Why?", 1) == "|SPEAKER|User: Why? Assistant:<0x04>"


def test_absent_keys_are_transformers_defaults() -> None:
    found, expected = Fuyu.from_config({}), FuyuConfig()
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"):
        assert getattr(found.text, key) == getattr(expected.text_config, key)
    assert (found.patch_size, found.text.rms_norm_eps) == (expected.patch_size, expected.text_config.layer_norm_eps)
    assert found.text.rotary_fraction == expected.text_config.rope_parameters["partial_rotary_factor"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"text_config": {"model_type": "llama"}}, "persimmon"),
        ({"text_config": {"num_attention_heads": 7}}, "num_attention_heads 7"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"num_channels": 1}, "num_channels is 1"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Fuyu.from_config(config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"patch_size": {"height": 30, "width": 15}}, "patch_size is 30 x 15"),
        ({"size": {"height": 1000, "width": 1920}}, "size is 1000 x 1920"),
        ({"do_pad": False}, "do_pad is false"),
        ({"padding_mode": "reflect"}, "constant"),
    ],
)
def test_pictures_that_the_model_does_not_take_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        PaddedRasterProcessor.from_config(config, 30)
