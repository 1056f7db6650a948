"""InstructBLIP from checkpoints that transformers' class wrote: the same embeddings, logits, tokens and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    OPTConfig,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.instructblip import InstructBlip
from graphs.dialogue import Dialogue, Segment
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.instructed import InstructedProcessor
from graphs.preprocess.picture import from_json
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.graphs.architectures.test_blip2 import LLAMA, MEAN, OPT, QFORMER, STD, T5, VISION
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, photographs, randomized, raw_pixels, save
from tests.published import counted

#: the Q-Former's vocabulary and most positions
READER = {**QFORMER, "vocab_size": 262, "max_position_embeddings": 40}
CASES: dict[str, dict[str, Any]] = {
    "vicuna": {},
    "opt, odd": {
        "vision": {**VISION, "num_attention_heads": 8, "image_size": 28, "patch_size": 7},
        "qformer": {**READER, "num_hidden_layers": 4, "cross_attention_frequency": 3, "hidden_act": "relu"},
        "text": OPTConfig(**OPT),
    },
    "t5": {"text": T5Config(**{**T5, "feed_forward_proj": "gated-gelu"})},
}


def reference(vision: dict[str, Any] = VISION, qformer: dict[str, Any] = READER, text: Any = None) -> Any:
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**vision),
        qformer_config=InstructBlipQFormerConfig(**qformer),
        text_config=text or LlamaConfig(**LLAMA, eos_token_id=257),
        num_query_tokens=6,
        image_token_index=259,
    )
    return randomized(InstructBlipForConditionalGeneration(config))


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made = reference(**CASES[case])
    model = load_model(Request("instructblip", checkpoint=str(save(made, tmp_path))))
    architecture = model.architecture
    assert isinstance(architecture, InstructBlip)
    runtime = EagerRuntime(trace(architecture, model.weights))
    pictures = raw_pixels(architecture.image_size, 2)
    seq2seq = made.config.text_config.is_encoder_decoder
    start = (258,) if seq2seq else ()
    before, after = [1, 5, 60, 7], [9, 33, 4, 18]
    seen = []
    with torch.no_grad():
        for number, pixels in enumerate(pictures):
            normal = (torch.from_numpy(pixels) / 255 - MEAN) / STD
            for instruction in ([[3]], [[5, 7, 200, 31, 9, 9, 18]], [list(range(40))]):
                ids = np.array(instruction, np.int64)
                expected = made.get_image_features(normal, torch.from_numpy(ids)).pooler_output
                (image_embeds,) = runtime.call("vision_encoder", [pixels, ids])
                assert relative_l2(torch.from_numpy(image_embeds), expected) <= 1e-5
                seen.append(expected[0])
            prompt: list[Segment] = [(pixels, ids), before] if number == 0 else [before]
            tokens = torch.tensor([[259] * 6 + before if number == 0 else before])
            embeds = made.get_input_embeddings()(tokens)
            embeds[tokens == 259] = expected[0] if number == 0 else embeds[tokens == 259]
            runtime.reset()
            dialogue = Dialogue(runtime, start)
            logits = torch.from_numpy(dialogue.prefill(dialogue.embed([*prompt, after])))
            embeds = torch.cat([embeds, made.get_input_embeddings()(torch.tensor([after]))], dim=1)
            decoded = {"decoder_input_ids": torch.tensor([[258]])} if seq2seq else {}
            whole = made.language_model(inputs_embeds=embeds, **decoded).logits[0, -1]
            assert relative_l2(logits, whole) <= 1e-5
            options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "min_new_tokens": 6}
            greedy = made.language_model.generate(inputs_embeds=embeds, **options)[0].tolist()
            given = [*prompt, after]
            *_, last = generate(runtime, given, context=architecture.context, max_new_tokens=6, start=start)
            assert last.tokens == greedy[-6:]
    assert min(relative_l2(seen[0], other) for other in seen[1:3]) > 1e-2  # the instruction matters


def test_the_layout_of_the_hub_repeats_what_is_tied(tmp_path: Path) -> None:
    made = reference(text=T5Config(**T5))
    made.save_pretrained(tmp_path / "a")
    (tmp_path / "b").mkdir()
    tensors = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    tensors["qformer.embeddings.position_ids"] = torch.arange(40)[None]
    assert len(tensors) > len(load_file(tmp_path / "a" / "model.safetensors"))
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    one, other = (load_model(Request("instructblip", checkpoint=str(tmp_path / name))) for name in "ab")
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_bundles_answer_as_transformers_does(tmp_path: Path) -> None:
    """The second tokenizer travels with the bundle, and the question reaches the Q-Former by it."""
    tokenizer, reader = byte_tokenizer(), byte_tokenizer()
    for one, around in ((tokenizer, "<s> $A"), (reader, "<s> $A </s>")):
        specials = [("<s>", 256), ("</s>", 257)]
        one.backend_tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=specials)
    made = reference()
    processor = InstructBlipProcessor(
        BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, reader, num_query_tokens=6
    )
    directory = save(made, tmp_path / "made")
    processor.save_pretrained(directory)
    options = ExportOptions(
        Request("instructblip", checkpoint=str(directory)), "onnxruntime", "reference-fp32", out=tmp_path / "b"
    )
    bundle = Bundle.open(export(options, silent))
    assert "qformer_tokenizer/tokenizer.json" in bundle.manifest["files"]
    session = Session.open(bundle)
    answers = set()
    for photograph in photographs()[:2]:
        for words in ("What is it?", "Who is in this picture, and why?"):
            inputs = processor(text=words, images=photograph, return_tensors="pt")
            length = inputs["input_ids"].shape[1]
            tokens = made.generate(**inputs, do_sample=False, max_new_tokens=8)[0, length:]
            answer, _ = session.answer(words, [photograph], max_new_tokens=8)
            assert answer == processor.decode(tokens, skip_special_tokens=True).strip()
            answers.add(answer)
    assert len(answers) > 2
    again = from_json(bundle.manifest["prompt"]["image"])
    assert isinstance(again, InstructedProcessor)
    assert again == load_model(options.request).architecture.image_processor
    (bundle.directory / "qformer_tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no qformer_tokenizer"):
        again.beside(bundle.directory)


def test_published_sizes_count() -> None:
    counted(InstructBlip)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_config": {"model_type": "vicuna"}}, "llama"),
        ({"qformer_config": {"max_position_embeddings": 0}}, "max_position_embeddings is 0"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        InstructBlip.from_config(change)
