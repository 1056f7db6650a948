"""PaliGemma and PaliGemma 2 from checkpoints that transformers' class wrote: the same embeddings, logits and answers.

Both rows are one class, as both are there: the decoder's family makes the difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.paligemma import PaliGemma
from graphs.architectures.paligemma2 import GEMMA2_2B, PaliGemma2
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.picture import Picture
from graphs.preprocess.prompt import read
from graphs.preprocess.tokenizer import load_tokenizer
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.answers import all_logits, greedy_tokens
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, photographs, randomized, save
from tests.published import counted

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "vocab_size": 1500,
    "max_position_embeddings": 128,
    "eos_token_id": 257,
}
WINDOW = {
    "sliding_window": 7,
    "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
}
CASES: dict[str, dict[str, Any]] = {
    "paligemma": {},
    "paligemma, odd": {
        "vision": {**VISION, "hidden_size": 36, "num_attention_heads": 3, "image_size": 35, "patch_size": 7},
        "text": {**TEXT, "num_key_value_heads": 2, "attention_bias": True},
        "tied": False,
    },
    "paligemma2": {"decoder": Gemma2Config, "text": {**TEXT, "num_key_value_heads": 2, **WINDOW}},
    "paligemma2, odd": {
        "vision": {**VISION, "vision_use_head": True},
        "decoder": Gemma2Config,
        "text": {
            **TEXT,
            **WINDOW,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": None,
        },
    },
}


def reference(
    directory: Path,
    vision: dict[str, Any] = VISION,
    text: dict[str, Any] = TEXT,
    decoder: type = GemmaConfig,
    tied: bool = True,
) -> tuple[Any, PaliGemmaProcessor]:
    """A model and its processor, both written into `directory`."""
    tokenizer: Any = byte_tokenizer(bos_token="<bos>")
    images: Any = SiglipImageProcessorPil(size={"height": vision["image_size"], "width": vision["image_size"]})
    images.image_seq_length = (vision["image_size"] // vision["patch_size"]) ** 2
    processor = PaliGemmaProcessor(images, tokenizer)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=decoder(**text),
        projection_dim=text["hidden_size"],
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
    )
    made = randomized(PaliGemmaForConditionalGeneration(config))
    save(made, directory)
    processor.save_pretrained(directory)
    return made, processor


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path, **CASES[case])
    model = load_model(Request(case.split(",")[0], checkpoint=str(tmp_path)))
    architecture = model.architecture
    assert isinstance(architecture, PaliGemma)
    assert architecture.image_processor is not None
    assert architecture.template is not None
    words = load_tokenizer(tmp_path)
    assert words is not None
    runtime = EagerRuntime(trace(architecture, model.weights))
    with torch.no_grad():
        for photograph in photographs():
            inputs = processor.image_processor(photograph, return_tensors="pt")
            pixels = architecture.image_processor.picture(photograph).arrays[0]
            assert relative_l2(torch.from_numpy(pixels) / 255 * 2 - 1, inputs["pixel_values"]) <= 1e-6
            (image_embeds,) = runtime.call("vision_encoder", [pixels])
            features = made.get_image_features(**inputs).pooler_output
            assert relative_l2(torch.from_numpy(image_embeds), features) <= 1e-5
            assert image_embeds.shape[1] == architecture.visual_tokens
        for count in (0, 1, 2):
            seen = photographs()[:count]
            pieces = read(architecture.template, "Hm?", [architecture.image_processor.picture(p) for p in seen], words)
            if count:
                inputs = dict(processor(text="<image>" * count + "Hm?", images=seen, return_tensors="pt"))
                inputs.pop("labels")
            else:  # the processor asks for pictures, the model does not
                ids = processor.tokenizer("<bos>Hm?\n", return_tensors="pt")["input_ids"]
                inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
            assert relative_l2(all_logits(runtime, pieces), made(**inputs).logits) <= 1e-5
            expected = made.generate(**inputs, do_sample=False, max_new_tokens=9, eos_token_id=None)
            tokens = greedy_tokens(runtime, pieces, architecture.context, 9)
            assert tokens == expected[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_prompt_is_the_processors(tmp_path: Path) -> None:
    _, processor = reference(tmp_path)
    words, template = load_tokenizer(tmp_path), PaliGemma.variants()[0].architecture.template
    assert words is not None
    assert template is not None
    words.adds_bos = True  # as published tokenizers do, and the processor tells them not to
    picture = Picture((np.zeros((1, 3, 32, 32), np.uint8),))
    for prompt, count in (("Hm?", 1), ("Hm?", 2), ("a<image>b<image>c", 2)):
        assert template.render(prompt, count).count("<bos>") == 1
        ids = processor(text="<image>" * count + prompt if count and "<" not in prompt else prompt,
                        images=photographs()[:count], return_tensors="np")["input_ids"][0].tolist()  # fmt: skip
        mark = processor.image_token_id
        found: list[int] = []
        for piece in read(template, prompt, [picture] * count, words):
            found += piece if isinstance(piece, list) else [mark] * 16
        assert found == ids


LAYOUTS: dict[str, list[tuple[str, str]]] = {
    "hub": [("vision_tower.", "vision_tower.vision_model.")],
    "in memory": [
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_public_layouts_hold_the_same(layout: str, tmp_path: Path) -> None:
    made, _ = reference(tmp_path / "a", tied=False)
    made.save_pretrained(tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        old, new = next((rule for rule in LAYOUTS[layout] if name.startswith(rule[0])), ("", ""))
        renamed[new + name.removeprefix(old)] = tensor
    save_file(renamed, tmp_path / "b" / "model.safetensors")
    assert layout == "hub" or not set(renamed) & set(tensors)
    expected, found = (load_model(Request("paligemma", checkpoint=str(tmp_path / name))).weights for name in "ab")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def test_norms_are_counted_from_one(tmp_path: Path) -> None:
    made, _ = reference(tmp_path, **CASES["paligemma2"])
    weights = load_model(Request("paligemma2", checkpoint=str(tmp_path))).weights
    norm = made.model.language_model.layers[1].post_feedforward_layernorm.weight
    assert torch.equal(weights["text_decoder.layers.1.post_feedforward_layernorm.weight"], norm.detach() + 1)
    projection = made.model.language_model.layers[1].self_attn.q_proj.weight
    assert torch.equal(weights["text_decoder.layers.1.self_attn.q_proj.weight"], projection.detach())


@pytest.mark.parametrize("case", ["paligemma", "paligemma2"])
def test_bundles_answer_as_transformers_does(case: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path / "made", **CASES[case])
    request = Request(case, checkpoint=str(tmp_path / "made"))
    bundle = export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    answers = set()
    for photograph in photographs()[:3]:
        answer, _ = session.answer("caption en", [photograph], max_new_tokens=8)
        inputs = dict(processor(text="<image>caption en", images=photograph, return_tensors="pt"))
        inputs.pop("labels")
        tokens = made.generate(**inputs, do_sample=False, max_new_tokens=8)
        expected = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == expected.strip()
        answers.add(answer)
    assert len(answers) > 1


def test_published_sizes_count() -> None:
    counted(PaliGemma, PaliGemma2)


def test_a_published_configuration_is_the_published_size() -> None:
    """config.json of google/paligemma2-3b-pt-448, which says little more than sizes."""
    config = {
        "model_type": "paligemma",
        "projection_dim": 2304,
        "text_config": {
            "model_type": "gemma2",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "vocab_size": 257216,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 448,
        },
    }
    found = PaliGemma2.from_config(config)
    assert found.text == GEMMA2_2B
    assert found == next(v.architecture for v in PaliGemma2.variants() if v.name == "paligemma2-3b-448")
    assert found.context == 1024 + 1024
    old = {"projection_dim": 48, "text_config": {**TEXT, "model_type": "gemma", "hidden_act": "gelu"}}
    assert PaliGemma.from_config(old).text.hidden_act == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_config": {"model_type": "clip_vision_model"}}, "siglip_vision_model"),
        ({"text_config": {"model_type": "gemma3"}}, "did you mean .gemma."),
        ({"projection_dim": 1024}, "projection_dim is 1024"),
        ({"text_config": {"model_type": "gemma2", "layer_types": ["full"]}}, "layer_types"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        PaliGemma.from_config({"model_type": "paligemma", **change})
