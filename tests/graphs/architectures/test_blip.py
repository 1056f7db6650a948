"""BLIP's three classes, from checkpoints that transformers wrote: the same states, scores, logits, tokens and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.blip import Blip
from graphs.components.vision.blip import BLIP_BASE
from graphs.dialogue import Dialogue
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from runtimes.manifest import Bundle
from runtimes.session import Session, open_runtime
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, photographs, randomized, raw_pixels, save
from tests.published import counted

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
BEGIN, END = 262, 261

VISION: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 264,
    "max_position_embeddings": 64,
    "bos_token_id": BEGIN,
    "sep_token_id": END,
    "pad_token_id": 258,
}
ODD: dict[str, Any] = {
    "vision": {**VISION, "num_attention_heads": 5, "image_size": 50, "patch_size": 7, "hidden_act": "quick_gelu"},
    "text": {**TEXT, "num_attention_heads": 8, "hidden_act": "relu", "layer_norm_eps": 1e-5},
    "image_text_hidden_size": 17,
}
CLASSES = {
    "caption": BlipForConditionalGeneration,
    "answer": BlipForQuestionAnswering,
    "retrieve": BlipForImageTextRetrieval,
}


def reference(task: str, vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT, **options: Any) -> Any:
    """A random model whose norms are about one, so that states, normed at last, still tell tokens apart."""
    config = BlipConfig(vision_config=BlipVisionConfig(**vision), text_config=BlipTextConfig(**text), **options)
    made = randomized(CLASSES[task](config))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.lower().endswith(("norm.weight", "norm1.weight", "norm2.weight")):
                parameter.add_(1.0)
    return made


def loaded(directory: Path) -> tuple[Blip, EagerRuntime]:
    model = load_model(Request("blip", checkpoint=str(directory)))
    assert isinstance(model.architecture, Blip)
    return model.architecture, EagerRuntime(trace(model.architecture, model.weights))


def normal(pixels: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(pixels) / 255 - MEAN) / STD


def decodes_the_same(runtime: EagerRuntime, prompt: list[Any], text: Any, about: torch.Tensor, ids: list[int]) -> None:
    """Logits and greedy tokens of what follows `ids`, which the decoder `text` reads about states."""
    runtime.reset()
    start = (BEGIN,)
    dialogue = Dialogue(runtime, start)
    logits = torch.from_numpy(dialogue.prefill(dialogue.embed(prompt)))
    expected = text(torch.tensor([ids]), encoder_hidden_states=about).logits[0, -1]
    assert relative_l2(logits, expected) <= 1e-5
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "eos_token_id": END, "pad_token_id": 258}
    tokens = text.generate(torch.tensor([ids]), encoder_hidden_states=about, **options)[0, len(ids) :].tolist()
    *_, last = generate(runtime, prompt, context=64, max_new_tokens=6, start=start)
    assert last.tokens == tokens


@pytest.mark.parametrize("odd", [False, True])
def test_captions_equal_transformers(odd: bool, tmp_path: Path) -> None:
    wider = {"vision": {**ODD["vision"], "hidden_size": 50}} if odd else {}
    made = reference("caption", **{**(ODD if odd else {}), **wider})
    architecture, runtime = loaded(save(made, tmp_path))
    with torch.no_grad():
        for pixels, words in zip(raw_pixels(architecture.vision.image_size, 3), ([], [5], [9, 33, 4, 18]), strict=True):
            states = made.vision_model(normal(pixels)).last_hidden_state
            keys, values = (torch.from_numpy(array) for array in runtime.call("vision_encoder", [pixels]))
            for index, layer in enumerate(made.text_decoder.bert.encoder.layer):
                for found, proj in ((keys, layer.crossattention.self.key), (values, layer.crossattention.self.value)):
                    assert relative_l2(found[index].transpose(0, 1).flatten(1), proj(states)[0]) <= 1e-5
            decodes_the_same(
                runtime, [pixels, words] if words else [pixels], made.text_decoder, states, [BEGIN, *words]
            )


@pytest.mark.parametrize("odd", [False, True])
def test_answers_equal_transformers(odd: bool, tmp_path: Path) -> None:
    made = reference("answer", **(ODD if odd else {}))
    architecture, runtime = loaded(save(made, tmp_path))
    with torch.no_grad():
        for pixels, words in zip(raw_pixels(architecture.vision.image_size, 2), ([3, 8, 1], [9] * 11), strict=True):
            states = made.vision_model(normal(pixels)).last_hidden_state
            question = made.text_encoder(torch.tensor([words]), encoder_hidden_states=states).last_hidden_state
            decodes_the_same(runtime, [pixels, words], made.text_decoder, question, [BEGIN])


@pytest.mark.parametrize("odd", [False, True])
def test_scores_equal_transformers(odd: bool, tmp_path: Path) -> None:
    wider = {"vision": {**ODD["vision"], "hidden_size": 50}} if odd else {}
    made = reference("retrieve", **{**(ODD if odd else {}), **wider})
    architecture, runtime = loaded(save(made, tmp_path))
    pictures, texts = raw_pixels(architecture.vision.image_size, 2), [[3], [9, 33, 4, 18, 7]]
    with torch.no_grad():
        cosines = np.zeros((2, 2))
        images = [runtime.call("image_encoder", [pixels]) for pixels in pictures]
        words = [np.array([text], np.int64) for text in texts]
        embedded = [runtime.call("text_encoder", [ids])[0] for ids in words]
        (found,) = runtime.call(
            "similarity", [np.concatenate([image[0] for image in images]), np.concatenate(embedded)]
        )
        for row, (pixels, image) in enumerate(zip(pictures, images, strict=True)):
            for column, ids in enumerate(words):
                given = (torch.from_numpy(ids), normal(pixels))
                cosines[row, column] = made(*given, use_itm_head=False).itm_score.item()
                (matched,) = runtime.call("matching", [ids, *image[1:]])
                assert relative_l2(torch.from_numpy(matched), made(*given).itm_score) <= 1e-5
    assert relative_l2(torch.from_numpy(found), torch.from_numpy(cosines)) <= 1e-5


@pytest.mark.parametrize("task", CLASSES)
def test_the_layout_of_the_hub_repeats_what_is_tied(task: str, tmp_path: Path) -> None:
    made = reference(task)
    save(made, tmp_path / "a")
    made.save_pretrained(tmp_path / "b")
    written = load_file(tmp_path / "b" / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    names = [name for name in tensors if name.endswith("embeddings.position_embeddings.weight")]
    tensors |= {name.replace("embeddings.weight", "ids"): torch.arange(64)[None] for name in names}
    assert len(tensors) > len(written)
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    one, other = (load_model(Request("blip", checkpoint=str(tmp_path / name))) for name in "ab")
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def written(task: str, directory: Path) -> tuple[Any, BlipProcessor]:
    """A model and its processor: what a fine-tune looks like on a disk."""
    tokenizer = byte_tokenizer(cls_token="[CLS]", sep_token="[SEP]")
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    around = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = around
    made = reference(task, text={**TEXT, "sep_token_id": ids[1][1]})
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    save(made, directory)
    processor.save_pretrained(directory)
    return made, processor


@pytest.mark.parametrize("task", ["caption", "answer"])
def test_bundles_say_what_transformers_does(task: str, tmp_path: Path) -> None:
    made, processor = written(task, tmp_path / "made")
    options = ExportOptions(
        Request("blip", checkpoint=str(tmp_path / "made")), "onnxruntime", "reference-fp32", out=tmp_path / "b"
    )
    session = Session.open(Bundle.open(export(options, silent)))
    answers = set()
    for photograph, words in zip(photographs(), ("a picture of", "what?", "how many are there?", "a"), strict=True):
        inputs = processor(text=words, images=photograph, return_tensors="pt")
        assert session.processor is not None
        pixels = session.processor(photograph)
        assert isinstance(pixels, np.ndarray)
        assert relative_l2(normal(pixels), inputs["pixel_values"]) <= 1e-6
        read = inputs["input_ids"].shape[1] - 1 if task == "caption" else 1
        tokens = made.generate(**inputs, do_sample=False, max_new_tokens=8)[0, read:]
        answer, _ = session.answer(words, [photograph], max_new_tokens=8)
        assert answer == processor.decode(tokens, skip_special_tokens=True).strip()
        answers.add(answer)
    assert len(answers) > 1


def test_bundles_score_as_transformers_does(tmp_path: Path) -> None:
    made, processor = written("retrieve", tmp_path / "made")
    request = Request("blip", checkpoint=str(tmp_path / "made"))
    options = ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b")
    bundle = Bundle.open(export(options, silent))
    assert bundle.manifest["prompt"]["template"] is None
    runtime = open_runtime(bundle)
    architecture = load_model(request).architecture
    for photograph in photographs()[:2]:
        inputs = processor(text="a flower", images=photograph, return_tensors="pt")
        pixels = architecture.image_processor(photograph)  # type: ignore[misc]
        image, *seen = runtime.call("image_encoder", [pixels])
        ids = inputs["input_ids"].numpy()
        (text,) = runtime.call("text_encoder", [ids])
        (cosine,) = runtime.call("similarity", [image, text])
        (matched,) = runtime.call("matching", [ids, *seen])
        with torch.no_grad():
            assert relative_l2(torch.from_numpy(matched), made(**inputs).itm_score) <= 1e-4
            assert relative_l2(torch.from_numpy(cosine), made(**inputs, use_itm_head=False).itm_score) <= 1e-4


def test_published_sizes_count() -> None:
    counted(Blip)


def test_absent_keys_are_transformers_defaults() -> None:
    found, expected = Blip.from_config({}), BlipConfig()
    assert (found.vision, found.shared, found.task) == (BLIP_BASE, expected.image_text_hidden_size, "caption")
    for ours, theirs in ((found.vision, expected.vision_config), (found.text, expected.text_config)):
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps"):
            assert getattr(ours, key) == getattr(theirs, key)
    assert (found.marks.begin, found.marks.end) == (
        expected.text_config.bos_token_id,
        expected.text_config.sep_token_id,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["BlipModel"]}, "architectures names BlipModel"),
        ({"architectures": ["BlipForQuestionAnswering"], "vision_config": {"hidden_size": 1020}}, "must be equal"),
        ({"text_config": {"num_attention_heads": 7}}, "hidden_size 768 is not a multiple of num_attention_heads 7"),
        ({"text_config": {"hidden_act": "glu"}}, "gelu"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Blip.from_config(change)
