"""Llama 3.2 Vision and LLaVA-CoT from checkpoints that transformers' class wrote: the same logits, tokens and text."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.llama3_2_vision import Mllama
from graphs.architectures.llava_cot import LlavaCot
from graphs.components.text.gated_cross import MLLAMA
from graphs.components.vision.mllama import MllamaVisionConfig
from graphs.dialogue import Dialogue, Segment, spans
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.picture import from_json
from graphs.preprocess.prompt import read
from graphs.preprocess.tokenizer import Tokenizer, load_tokenizer
from graphs.trace import trace
from runtimes.base import Caller
from runtimes.eager import EagerRuntime
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.answers import greedy_tokens
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, odd_pictures, photographs, randomized, save
from tests.published import counted

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 96,
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 160,
    "cross_attention_layers": [1, 3],
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TWO_TILES = {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
CASES: dict[str, dict[str, Any]] = {
    "published proportions": {"text": {**TEXT, "rope_parameters": LLAMA3}},
    "odd": {
        "vision": {
            **VISION,
            **TWO_TILES,
            "hidden_size": 40,
            "attention_heads": 5,
            "image_size": 45,
            "patch_size": 9,
            "intermediate_layers_indices": [1],
            "vision_output_dim": 80,
            "num_global_layers": 1,
            "norm_eps": 1e-3,
        },
        "text": {**TEXT, "num_attention_heads": 3, "num_key_value_heads": 3, "cross_attention_layers": [0]},
    },
}


def reference(
    directory: Path, vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT, std: float = 0.2
) -> tuple[Any, MllamaProcessor]:
    """A model and its processor, both written into `directory`."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|image|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    image = tokenizer.convert_tokens_to_ids("<|image|>")
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=image)
    made = randomized(MllamaForConditionalGeneration(config), std)
    side, tiles = vision["image_size"], vision.get("max_num_tiles", 4)
    images = MllamaImageProcessorPil(size={"height": side, "width": side}, max_image_tiles=tiles)
    processor = MllamaProcessor(images, tokenizer)
    save(made, directory)
    processor.save_pretrained(directory)
    return made, processor


def pictures() -> list[Image.Image]:
    """Photographs, and shapes of every number of tiles."""
    return odd_pictures((20, 24), (24, 70), (90, 7), (3, 400), (40, 40), (31, 33), (1, 1))


def logits(runtime: Caller, segments: list[Segment]) -> torch.Tensor:
    """The logits [1, S, V] of every token of a prompt."""
    dialogue = Dialogue(runtime)
    prompt = dialogue.embed(segments)
    known = {"inputs_embeds": prompt.embeds_1SD, "cache_position": np.arange(prompt.length), **prompt.carried}
    known["cross_span"] = prompt.span_S2
    runtime.reset()
    return torch.from_numpy(runtime.call("text_decoder", dialogue.inputs("text_decoder", known))[0])


@dataclass(frozen=True)
class Pair:
    """A model of transformers with its processor, and what was loaded from the checkpoint it wrote."""

    made: Any
    processor: MllamaProcessor
    architecture: Mllama
    runtime: Caller
    tokenizer: Tokenizer


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("made")
    made, processor = reference(directory, **CASES[request.param])
    model = load_model(Request("llama3_2_vision", checkpoint=str(directory)))
    tokenizer = load_tokenizer(directory)
    assert isinstance(model.architecture, Mllama)
    assert tokenizer is not None
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    return Pair(made, processor, model.architecture, runtime, tokenizer)


def test_equals_transformers(pair: Pair) -> None:
    made, processor, architecture, runtime = pair.made, pair.processor, pair.architecture, pair.runtime
    bare = replace(architecture.template, user="", assistant="")
    one, many, narrow = photographs()[:3]
    prompts: list[tuple[str, list[Image.Image]]] = [
        ("<s>Hi <|image|>What?", [one]),
        ("<|image|><s>What?", [narrow]),
        ("<s><|image|><|image|>Both, <|image|>and then?", [one, pictures()[4], many]),
        ("<s>a<|image|>b<|image|><|image|>c", [narrow, one, pictures()[6]]),
        ("<s>no picture", []),
    ]
    for text, seen in prompts:
        inputs = dict(processor(text=text, images=seen or None, return_tensors="pt", add_special_tokens=False))
        ids = inputs["input_ids"]
        given = [architecture.image_processor.picture(picture) for picture in seen]
        segments = list(read(bare, text, given, pair.tokenizer))
        with torch.no_grad():
            assert relative_l2(logits(runtime, segments), made(**inputs).logits) <= 1e-5
            expected = made.generate(**inputs, do_sample=False, max_new_tokens=6, eos_token_id=None)
        assert greedy_tokens(runtime, segments, architecture.context, 6) == expected[0, ids.shape[1] :].tolist()


def test_what_is_read_of_a_picture_is_transformers(pair: Pair) -> None:
    made, processor, runtime = pair.made, pair.processor, pair.runtime
    shown = set()
    for picture in pictures():
        tiles, ratio, mask = pair.architecture.image_processor(picture)
        inputs = processor.image_processor(picture, return_tensors="pt")
        normal = (torch.from_numpy(tiles) / 255 - 0.5) / 0.5 * torch.from_numpy(mask)[:, None, None, None]
        assert relative_l2(normal, inputs["pixel_values"][0, 0]) <= 1e-6
        assert (ratio.tolist(), mask.tolist()) == (
            inputs["aspect_ratio_ids"][0].tolist(),
            inputs["aspect_ratio_mask"][0, 0].tolist(),
        )
        shown.add(int(mask.sum()))
    assert len(shown) >= 2
    with torch.no_grad():
        for picture in (pictures()[2], pictures()[4]):
            keys, values, padded = runtime.call("vision_encoder", list(pair.architecture.image_processor(picture)))
            inputs = {**processor.image_processor(picture, return_tensors="pt")}
            inputs.pop("num_tiles")
            states = made.model.multi_modal_projector(made.model.vision_model(**inputs).last_hidden_state).flatten(1, 3)
            for index, layer in enumerate(pair.architecture.cross_layers):
                attention = made.model.language_model.layers[layer].cross_attn
                k, v = (
                    projection(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                    for projection in (attention.k_proj, attention.v_proj)
                )
                assert relative_l2(torch.from_numpy(keys[index : index + 1]), attention.k_norm(k)) <= 1e-5
                assert relative_l2(torch.from_numpy(values[index : index + 1]), v) <= 1e-5
            assert padded.shape == (keys.shape[2], 1)
            assert padded.sum() == inputs["aspect_ratio_mask"].sum() * pair.architecture.vision.tokens


def test_the_layout_in_memory_holds_the_same(tmp_path: Path) -> None:
    made, _ = reference(tmp_path / "a")
    renamed = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    written = {name for shard in (tmp_path / "a").glob("*.safetensors") for name in load_file(shard)}
    assert "language_model.model.embed_tokens.weight" in written
    assert "model.language_model.embed_tokens.weight" in renamed
    (tmp_path / "b").mkdir()
    save_file(renamed, tmp_path / "b" / "model.safetensors")
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    (tmp_path / "b" / "processor_config.json").write_bytes((tmp_path / "a" / "processor_config.json").read_bytes())
    one, other = (load_model(Request("llama3_2_vision", checkpoint=str(tmp_path / name))) for name in "ab")
    assert one.architecture == other.architecture
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


@pytest.mark.parametrize(("system", "target"), [("llama3_2_vision", "onnxruntime"), ("llava_cot", "executorch")])
def test_bundles_answer_as_transformers_does(system: str, target: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path / "made", std=0.3)
    request = Request(system, checkpoint=str(tmp_path / "made"))
    bundle = export(ExportOptions(request, target, "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    assert from_json(json.loads((bundle / "manifest.json").read_text())["prompt"]["image"]) == session.processor
    answers = set()
    for seen in ([photographs()[0]], photographs()[1:3], []):
        answer, _ = session.answer("Hm?", seen, max_new_tokens=8)
        text = session.template.render("Hm?", len(seen))
        assert text.startswith("<|start_header_id|>user<|end_header_id|>\n\n" + "<|image|>" * len(seen) + "Hm?")
        ids = processor(text=f"<s>{text}", images=seen or None, return_tensors="pt", add_special_tokens=False)
        ids = {name: value[:, 1:] if name in TEXTUAL else value for name, value in ids.items()}  # no token begins it
        tokens = made.generate(**ids, do_sample=False, max_new_tokens=8)[0, ids["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        answers.add(answer)
    assert len(answers) == 3


TEXTUAL = ("input_ids", "attention_mask", "cross_attention_mask")


def test_tokens_see_the_pictures_before_them() -> None:
    found = spans(8, [(1, 0, 5), (4, 5, 9), (5, 9, 12)])
    assert found.tolist() == [[0, 0], [0, 5], [0, 5], [0, 5], [5, 9], [5, 12], [5, 12], [5, 12]]
    assert spans(2, []).tolist() == [[0, 0], [0, 0]]


def test_llava_cot_is_llama_3_2_vision_up_to_its_weights() -> None:
    """Its hub files name MllamaForConditionalGeneration and the sizes of Llama-3.2-11B-Vision-Instruct."""
    config = {"vision_config": {"image_size": 560}, "text_config": {"rope_scaling": {**LLAMA3, "rope_theta": 5e5}}}
    one, other = Mllama.from_config(config), LlavaCot.from_config(config)
    assert vars(one) == vars(other)
    published = {variant.name: variant.architecture for system in (Mllama, LlavaCot) for variant in system.variants()}
    assert vars(published["llava-cot-11b"]) == vars(published["llama-3.2-11b-vision"])


def test_published_sizes_count() -> None:
    for variant in counted(Mllama, LlavaCot):
        if variant.name == "llama-3.2-11b-vision":
            assert isinstance(variant.architecture, Mllama)
            assert variant.architecture.visual_tokens == 4 * 1601
            assert variant.architecture.vision.features == 7680
            assert variant.architecture.cross_layers == (3, 8, 13, 18, 23, 28, 33, 38)


def test_absent_keys_are_transformers_defaults() -> None:
    found, expected = Mllama.from_config({}), MllamaConfig()
    assert (found.vision, found.text) == (MllamaVisionConfig(), MLLAMA)
    assert found.cross_layers == tuple(expected.text_config.cross_attention_layers)
    assert found.vision.states == tuple(expected.vision_config.intermediate_layers_indices)
    for key in ("hidden_size", "num_hidden_layers", "num_global_layers", "image_size", "max_num_tiles", "hidden_act"):
        assert getattr(found.vision, key) == getattr(expected.vision_config, key)
    for key in ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size", "rms_norm_eps", "hidden_act"):
        assert getattr(found.text, key) == getattr(expected.text_config, key)


@pytest.mark.parametrize(
    ("vision", "text", "preprocessor", "words"),
    [
        ({"attention_heads": 7}, {}, None, "not a multiple of attention_heads 7"),
        ({"vision_output_dim": 4096}, {}, None, "vision_output_dim must be 7680"),
        ({"supported_aspect_ratios": [[1, 1], [2, 2]]}, {}, None, "all that 4 tiles allow"),
        ({"intermediate_layers_indices": [3, 40]}, {}, None, "from 0 to 31"),
        ({"hidden_act": "gelus"}, {}, None, "gelu"),
        ({}, {"cross_attention_layers": []}, None, "cross_attention_layers is empty"),
        ({}, {"cross_attention_layers": [8, 3]}, None, "must rise"),
        ({}, {}, {"size": {"height": 560, "width": 560}}, "size.height is 560; this tower takes 4 tiles of 448"),
        ({}, {}, {"max_image_tiles": 2}, "max_image_tiles is 2"),
    ],
)
def test_what_is_not_supported_is_named(
    vision: dict[str, Any], text: dict[str, Any], preprocessor: dict[str, Any] | None, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        Mllama.from_config({"vision_config": vision, "text_config": text}, preprocessor)
