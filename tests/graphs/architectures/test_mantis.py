"""MANTIS from checkpoints that transformers' classes wrote: which graph each is, and how prompts count pictures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    FuyuConfig,
    FuyuForCausalLM,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.fuyu_8b import Fuyu
from graphs.architectures.idefics2 import Idefics2
from graphs.architectures.llava_1_5 import Llava
from graphs.architectures.mantis import Mantis, MantisFuyu, MantisIdefics2, MantisLlava
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.trace import build_fake
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.pretrained import byte_tokenizer, photographs, randomized, save
from tests.published import counted

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 512,
    "eos_token_id": 257,
}
PERSIMMON: dict[str, Any] = {
    **{key: value for key, value in TEXT.items() if key != "num_key_value_heads"},
    "model_type": "persimmon",
}


def llava(tower: type = SiglipVisionConfig) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=tower(**VISION),
        text_config=LlamaConfig(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        image_token_index=byte_tokenizer().convert_tokens_to_ids("<image>"),
    )
    return randomized(LlavaForConditionalGeneration(config))


def idefics2() -> Idefics2ForConditionalGeneration:
    return randomized(
        Idefics2ForConditionalGeneration(
            Idefics2Config(
                vision_config=VISION,
                text_config=MistralConfig(**TEXT),
                perceiver_config={"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4}
                | {"resampler_head_dim": 8, "num_key_value_heads": 2, "hidden_size": 48},
            )
        )
    )


def fuyu() -> FuyuForCausalLM:
    return randomized(FuyuForCausalLM(FuyuConfig(patch_size=6, text_config=PERSIMMON)))


SYSTEMS = {
    "siglip": (llava, "llava_1_5", MantisLlava),
    "clip": (lambda: llava(CLIPVisionConfig), "llava_1_5", MantisLlava),
    "idefics 2": (idefics2, "idefics2", MantisIdefics2),
    "fuyu": (fuyu, "fuyu_8b", MantisFuyu),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_checkpoint_is_read_as_what_it_is(system: str, tmp_path: Path) -> None:
    """The same configuration and the same weights as in that system's own row, which is shown equal to transformers."""
    make, row, kind = SYSTEMS[system]
    save(make(), tmp_path)
    mine, theirs = (load_model(Request(name, checkpoint=str(tmp_path))) for name in ("mantis", row))
    assert type(mine.architecture) is kind
    ignored = {"max_context"}
    expected = {key: value for key, value in asdict(theirs.architecture).items() if key not in ignored}
    assert {key: value for key, value in asdict(mine.architecture).items() if key not in ignored} == expected
    assert all(torch.equal(mine.weights[name], theirs.weights[name]) for name in theirs.weights)


def test_the_graphs_are_those_of_its_three_systems() -> None:
    """The paper (arXiv 2405.01483) trains them and changes none."""
    published = {variant.name: variant.architecture for variant in Mantis.variants()}
    for name, system in (("tiny", Llava), ("tiny-idefics2", Idefics2), ("tiny-fuyu", Fuyu)):
        theirs = next(variant.architecture for variant in system.variants() if variant.name == "tiny")
        assert isinstance(published[name], system)
        mine, other = (dict(build_fake(one).named_parameters()) for one in (published[name], theirs))
        assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in other.items()}


def test_prompts_count_pictures() -> None:
    speaks = {variant.name: variant.architecture.template for variant in Mantis.variants()}
    text = speaks["tiny"].render("Compare <image> with <image>.", 2)  # type: ignore[union-attr]
    asked = "Compare (image 1: <Image><image></Image>) with (image 2: <Image><image></Image>)."
    assert f"<|start_header_id|>user<|end_header_id|>\n\n{asked}<|eot_id|>" in text
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    text = speaks["tiny-fuyu"].render("Why?", 2)  # type: ignore[union-attr]
    assert text.endswith("USER: image 0: |SPEAKER|image 1: |SPEAKER|Why?<0x04>ASSISTANT:")
    fuyu = next(variant.architecture for variant in Mantis.variants() if variant.name == "tiny-fuyu")
    picture = fuyu.image_processor.picture(photographs()[3])  # type: ignore[union-attr]
    assert picture.text == "|IMAGE|" + ("|SPEAKER|" * 5 + "|NEWLINE|") * 4 + "|ENDOFIMAGE|<s>"
    assert speaks["tiny-idefics2"] == Idefics2.variants()[0].architecture.template


def test_a_bundle_answers_as_transformers_does(tmp_path: Path) -> None:
    made, tokenizer = llava(), byte_tokenizer()
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=0
    )
    save(made, tmp_path / "made")
    processor.save_pretrained(tmp_path / "made")
    request = Request("mantis", checkpoint=str(tmp_path / "made"))
    bundle = export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    for pictures in ([], photographs()[:1], photographs()[:3]):
        answer, _ = session.answer("Hm?", pictures, max_new_tokens=8)
        text = session.template.render("Hm?", len(pictures))
        inputs = processor(text=text, images=pictures or None, return_tensors="pt")
        tokens = made.generate(**inputs, do_sample=False, max_new_tokens=8)
        expected = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == expected.strip()


def test_published_sizes_count() -> None:
    counted(Mantis)


def test_other_systems_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'idefics2'"):
        Mantis.from_config({"model_type": "idefics3"})
