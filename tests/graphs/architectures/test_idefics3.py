"""Idefics 3 and SmolVLM from checkpoints that transformers' classes wrote: the same tiles, logits, tokens and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.idefics3 import LLAMA_31_8B, Idefics3
from graphs.architectures.smolvlm import SMOLLM2_135M, SmolVLM
from graphs.dialogue import Dialogue
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.picture import from_json
from graphs.preprocess.prompt import read
from graphs.preprocess.splitting import SplittingProcessor
from graphs.preprocess.tokenizer import load_tokenizer
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, odd_pictures, randomized, save
from tests.published import counted

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 6,
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 268,
    "max_position_embeddings": 768,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
ODD_VISION = {**VISION, "hidden_size": 40, "num_attention_heads": 5, "image_size": 30, "patch_size": 7}
ODD_TEXT = {**TEXT, "hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 10}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "idefics3": {"text": {**TEXT, "rope_parameters": LLAMA3}},
    "idefics3, odd, tied": {
        "vision": ODD_VISION,
        "text": ODD_TEXT,
        "tile": 44,
        "longest": 100,
        "scale_factor": 3,
        "tie_word_embeddings": True,
    },
    "smolvlm": {"system": "smolvlm", "scale_factor": 4},
    "smolvlm, not split": {"system": "smolvlm", "decoder": Qwen2Config, "split": False, "mean": [0.4, 0.5, 0.6]},
    "idefics3, mistral": {"decoder": MistralConfig, "text": {**TEXT, "sliding_window": 90}, "longest": 43},
}
CLASSES = {
    "idefics3": (Idefics3ForConditionalGeneration, Idefics3Config),
    "smolvlm": (SmolVLMForConditionalGeneration, SmolVLMConfig),
}


def reference(
    directory: Path,
    system: str = "idefics3",
    vision: dict[str, Any] = VISION,
    decoder: type = LlamaConfig,
    text: dict[str, Any] = TEXT,
    tile: int = 24,
    longest: int = 72,
    split: bool = True,
    mean: list[float] = [0.5, 0.5, 0.5],  # noqa: B006 (only read)
    scale_factor: int = 2,
    **options: Any,
) -> tuple[Any, Idefics3Processor]:
    """A model and its processor, both written into `directory`."""
    tokenizer = byte_tokenizer()
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": longest},
        max_image_size={"longest_edge": tile},
        do_image_splitting=split,
        image_mean=mean,
    )
    embeddings = (tile // vision["patch_size"] // scale_factor) ** 2
    processor = Idefics3Processor(images, tokenizer, image_seq_len=embeddings)
    model_class, config_class = CLASSES[system]
    config = config_class(
        vision_config=vision,
        text_config=decoder(**text),
        image_token_id=processor.image_token_id,
        scale_factor=scale_factor,
        **options,
    )
    made = randomized(model_class(config))
    save(made, directory)
    processor.save_pretrained(directory)
    return made, processor


def pictures() -> list[Image.Image]:
    """Photographs, and shapes that are hard to cut."""
    return odd_pictures((90, 7), (13, 400), (24, 24))


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path, **CASES[case])
    system = CASES[case].get("system", "idefics3")
    model = load_model(Request(system, checkpoint=str(tmp_path)))
    architecture = model.architecture
    assert isinstance(architecture, Idefics3)
    runtime = EagerRuntime(trace(architecture, model.weights))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    normal = architecture.image_processor
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (normal.image_mean, normal.image_std))
    counts = set()
    with torch.no_grad():
        for image in pictures():
            (tiles,) = normal.picture(image).arrays
            inputs = processor.image_processor(image, return_tensors="pt")
            assert relative_l2((torch.from_numpy(tiles) / 255 - mean) / std, inputs["pixel_values"][0]) <= 1e-6
            (image_embeds,) = runtime.call("vision_encoder", [tiles])
            features = torch.cat(made.get_image_features(**inputs).pooler_output)
            assert relative_l2(torch.from_numpy(image_embeds[0]), features) <= 1e-5
            assert image_embeds.shape[1] <= architecture.visual_tokens
            counts.add(len(tiles))
        assert min(counts) >= normal.tiles[0]
        assert max(counts) == normal.tiles[1]
        for count in (0, 1, 2):
            seen = pictures()[1 : 1 + count]
            inputs = processor(
                text=architecture.template.render("Hm?", count), images=seen or None, return_tensors="pt"
            )
            pieces = read(architecture.template, "Hm?", [normal.picture(image) for image in seen], tokenizer)
            prompt = Dialogue(runtime).embed(pieces)
            runtime.reset()
            (logits,) = runtime.call("text_decoder", [prompt.embeds_1SD, np.arange(prompt.length)])
            assert relative_l2(torch.from_numpy(logits), made(**inputs).logits) <= 1e-5
            expected = made.generate(**inputs, do_sample=False, max_new_tokens=5, eos_token_id=None)
            *_, last = generate(runtime, pieces, context=architecture.context, max_new_tokens=5)
            assert last.tokens == expected[0, prompt.length :].tolist()


def test_published_tiles_and_words() -> None:
    """17 tiles of 169 embeddings at most; words between them as transformers' processors write them."""
    architecture = next(v.architecture for v in Idefics3.variants() if v.name == "idefics3-8b")
    assert isinstance(architecture, Idefics3)
    processor = architecture.image_processor
    assert (processor.side, processor.longest_edge, processor.tokens) == (364, 1456, 169)
    assert processor.tiles == (5, 17)
    for size in ((640, 427), (427, 640), (1456, 1456), (5000, 90), (364, 364)):
        image = Image.new("RGB", size)
        rows, columns = processor.grid(image.height, image.width)
        counted = Idefics3ImageProcessorPil().get_number_of_image_patches(image.height, image.width, {})
        assert (rows * columns + 1, rows, columns) == counted
        words = get_image_prompt_string(
            rows, columns, 169, "<fake_token_around_image>", image_token="<image>", global_image_token="<global-img>"
        )
        assert processor.picture(image).text == words
    assert from_json(processor.to_json()) == processor


def test_the_turn_is_the_processors() -> None:
    """The chat template of the hub's checkpoints: a blank after the speaker unless a picture follows."""
    template = SmolVLM.variants()[1].architecture.template
    assert template is not None
    assert template.render("Why?", 0) == "<|im_start|>User: Why?<end_of_utterance>\nAssistant:"
    assert template.render("Why?", 2) == "<|im_start|>User:<image><image>Why?<end_of_utterance>\nAssistant:"
    assert template.render("In <image>?", 1) == "<|im_start|>User: In <image>?<end_of_utterance>\nAssistant:"


def test_bundles_answer_as_transformers_does(tmp_path: Path) -> None:
    made, processor = reference(tmp_path / "made", "smolvlm")
    request = Request("smolvlm", checkpoint=str(tmp_path / "made"), max_context=320)
    bundle = export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    for picture in pictures()[1:4]:
        answer, _ = session.answer("Hm?", [picture], max_new_tokens=8)
        inputs = processor(text=session.template.render("Hm?", 1), images=picture, return_tensors="pt")
        tokens = made.generate(**inputs, do_sample=False, max_new_tokens=8)
        expected = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == expected.strip()


@pytest.mark.parametrize("system", [Idefics3, SmolVLM])
def test_published_sizes_count(system: type[Idefics3]) -> None:
    counted(system)


def test_smolvlm_is_idefics3_up_to_configuration() -> None:
    """The hub's first SmolVLMs name Idefics3's class; both read the same keys into the same graph."""
    config = {"vision_config": {**VISION, "model_type": "smolvlm_vision"}, "text_config": TEXT}
    one, other = Idefics3.from_config(config), SmolVLM.from_config(config)
    assert one.build().state_dict().keys() == other.build().state_dict().keys()
    assert (one.vision, one.text, one.image_processor) == (other.vision, other.text, other.image_processor)


def test_the_hubs_keys_are_read() -> None:
    """What the config.json of Idefics3-8B-Llama3 and of SmolVLM-256M-Instruct say, as far as it matters here."""
    vision = {
        "hidden_size": 1152,
        "image_size": 364,
        "intermediate_size": 4304,
        "model_type": "idefics3",
        "num_hidden_layers": 27,
        "patch_size": 14,
    }
    rope = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    text = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "model_type": "llama",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": rope,
        "rope_theta": 500000.0,
        "vocab_size": 128259,
    }
    found = Idefics3.from_config({"scale_factor": 2, "vision_config": vision, "text_config": text})
    published = Idefics3.variants()[1].architecture
    assert isinstance(published, Idefics3)
    assert (found.vision, found.text) == (published.vision, LLAMA_31_8B)
    assert found.image_processor == published.image_processor
    vision = {
        "hidden_size": 768,
        "image_size": 512,
        "model_type": "smolvlm_vision",
        "num_attention_heads": 12,
        "patch_size": 16,
    }
    text = {
        "head_dim": 64,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "vocab_size": 49280,
    }
    small = SmolVLM.from_config({"scale_factor": 4, "vision_config": vision, "text_config": text})
    expected = SmolVLM.variants()[1].architecture
    assert isinstance(expected, SmolVLM)
    assert small.vision == expected.vision
    assert (small.text.head_width, small.text.hidden_size) == (SMOLLM2_135M.head_width, SMOLLM2_135M.hidden_size)
    assert small.visual_tokens == 17 * 64


@pytest.mark.parametrize(
    ("config", "preprocessor", "words"),
    [
        ({"vision_config": {"model_type": "idefics3_visoin"}}, {}, "idefics3_vision"),
        ({"text_config": {"model_type": "gemma"}}, {}, "llama"),
        ({"vision_config": VISION, "scale_factor": 3}, {}, "4 patches wide, which scale_factor 3"),
        ({"vision_config": VISION}, {"max_image_size": {"longest_edge": 5}}, "tiles of 5 pixels are 0 patches"),
        ({"vision_config": VISION}, {"size": {"height": 5, "width": 5}}, "must have longest_edge"),
        ({"vision_config": VISION}, {"do_resize": False}, "set do_image_splitting to false"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], preprocessor: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Idefics3.from_config(config, preprocessor)


def test_tiles_without_number_are_one() -> None:
    """Pictures that are not cut need not be resized first."""
    processor = SplittingProcessor.from_config({"do_resize": False, "do_image_splitting": False}, 24, 4)
    assert (processor.side, processor.tiles, processor.longest_edge) == (364, (1, 1), None)
    assert processor(Image.new("RGB", (30, 1000))).shape == (1, 3, 364, 364)
