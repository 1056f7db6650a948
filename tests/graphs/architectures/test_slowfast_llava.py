"""SlowFast-LLaVA from LLaVA-NeXT's checkpoints: transformers' tower and decoder, pooled as the paper's code does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.slowfast_llava import SlowFastLlava
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.image import CLIP_MEAN, CLIP_STD
from graphs.preprocess.picture import from_json
from graphs.preprocess.slow_fast import SlowFastProcessor, middles
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, photographs, randomized, save
from tests.published import counted

MEAN, STD = (torch.tensor(values).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 1024,
    "eos_token_id": 257,
}
CASES: dict[str, dict[str, Any]] = {
    "published shape": {},
    "odd": {"vision": {**VISION, "image_size": 50, "patch_size": 7}},
}


def reference(directory: Path, vision: dict[str, Any] = VISION) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT, written into `directory` with its processor of pictures and tokenizer."""
    tokenizer, side = byte_tokenizer(), vision["image_size"]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[side, side]],
    )
    made = randomized(LlavaNextForConditionalGeneration(config))
    save(made, directory)
    square = {"height": side, "width": side}
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return made


def video(count: int) -> list[Image.Image]:
    """A walk over a photograph."""
    whole = photographs()[0]
    return [whole.crop((3 * step, step, 3 * step + 300, step + 350)) for step in range(count)]


def pooled(frames_TND: Tensor, slow: int = 10, side: int = 4) -> Tensor:
    """Both pathways by torch's own pooling: pairs along the tokens, and cells of the grid."""
    count, tokens, width = frames_TND.shape
    grid = int(tokens**0.5)
    chosen = torch.linspace(0, count, slow + 1).to(torch.int32).tolist()[:-1]
    detailed = nn.MaxPool1d(2, 2)(frames_TND[chosen].transpose(1, 2)).transpose(1, 2).reshape(-1, width)
    cells = frames_TND.reshape(count, grid, grid, width).permute(3, 0, 1, 2)
    fast = nn.AdaptiveAvgPool2d((side, side))(cells).permute(1, 2, 3, 0).reshape(-1, width)
    return torch.cat([detailed, fast])


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_and_its_own_pooling(case: str, tmp_path: Path) -> None:
    made = reference(tmp_path, **CASES[case])
    model = load_model(Request("slowfast_llava", checkpoint=str(tmp_path)))
    architecture = model.architecture
    assert isinstance(architecture, SlowFastLlava)
    runtime = EagerRuntime(trace(architecture, model.weights))
    side, width = made.config.vision_config.image_size, made.config.text_config.hidden_size
    before, after = [1, 5, 60, 7], [9, 33, 4]
    with torch.no_grad():
        for count in (1, 7, 23):
            seen = architecture.image_processor.picture(video(count))
            stretched = [image.resize((side, side), resample=Image.Resampling.BICUBIC) for image in video(count)]
            raw = np.stack([np.asarray(stretched[index]).transpose(2, 0, 1) for index in middles(count, count)])
            assert np.array_equal(seen.arrays[0], raw)
            normal = (torch.from_numpy(seen.arrays[0]) / 255 - MEAN) / STD
            states = made.model.vision_tower(normal, output_hidden_states=True).hidden_states[-2][:, 1:]
            features = pooled(made.model.multi_modal_projector(states))
            (image_embeds,) = runtime.call("vision_encoder", seen.arrays)
            assert relative_l2(torch.from_numpy(image_embeds[0]), features) <= 1e-5
            assert len(features) <= architecture.visual_tokens
            words = made.model.get_input_embeddings()
            parts = [words(torch.tensor(before)), features, words(torch.tensor(after))]
            embeds = torch.cat(parts).reshape(1, -1, width)
            runtime.reset()
            (logits,) = runtime.call("text_decoder", [embeds.numpy(), np.arange(embeds.shape[1])])
            expected = made.lm_head(made.model.language_model(inputs_embeds=embeds).last_hidden_state)
            assert relative_l2(torch.from_numpy(logits), expected) <= 1e-5
            tokens = made.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=5, eos_token_id=None)
            *_, last = generate(runtime, [before, seen.arrays, after], context=architecture.context, max_new_tokens=5)
            assert last.tokens == tokens[0].tolist()


def test_the_original_layout_holds_the_same(tmp_path: Path) -> None:
    """As liuhaotian's checkpoints of LLaVA 1.6 are, tiles and newline included."""
    made = reference(tmp_path / "a")
    made.save_pretrained(tmp_path / "c")
    rules = [
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.", "model."),
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("image_newline", "model.image_newline"),
    ]
    renamed = {}
    for name, tensor in load_file(tmp_path / "c" / "model.safetensors").items():
        old, new = next(rule for rule in rules if name.startswith(rule[0]))
        renamed[new + name.removeprefix(old)] = tensor
    (tmp_path / "b").mkdir()
    save_file(renamed, tmp_path / "b" / "model.safetensors")
    config = {
        **TEXT,
        "vision_config": {**VISION, "hidden_act": "quick_gelu"},
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
    }
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    one, other = (load_model(Request("slowfast_llava", checkpoint=str(tmp_path / name))) for name in "ab")
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert one.architecture.image_processor == other.architecture.image_processor
    assert from_json(one.architecture.image_processor.to_json()) == one.architecture.image_processor  # type: ignore[union-attr]


def test_a_bundle_answers_as_transformers_does(tmp_path: Path) -> None:
    made = reference(tmp_path / "made")
    request = Request("slowfast_llava", checkpoint=str(tmp_path / "made"))
    bundle = export(ExportOptions(request, "executorch", "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    tokenizer = byte_tokenizer()
    for count in (1, 12):
        answer, _ = session.answer("Hm?", [video(count)], max_new_tokens=6)  # type: ignore[list-item]
        head, tail = session.template.render("Hm?", 1).split("<image>")
        assert head == "USER: "
        assert tail.endswith("Question: Hm? \nASSISTANT:\nAnswer: In the video,")
        pixels = torch.from_numpy(session.processor.picture(video(count)).arrays[0])  # type: ignore[union-attr, arg-type]
        with torch.no_grad():
            states = made.model.vision_tower((pixels / 255 - MEAN) / STD, output_hidden_states=True).hidden_states[-2]
            features = pooled(made.model.multi_modal_projector(states[:, 1:]))
            words = [
                made.model.get_input_embeddings()(torch.tensor(tokenizer(part).input_ids)) for part in (head, tail)
            ]
            embeds = torch.cat([words[0], features, words[1]]).unsqueeze(0)
            tokens = made.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=6)
        assert answer == tokenizer.decode(tokens[0], skip_special_tokens=True).strip()


def test_frames_are_sampled_as_published() -> None:
    assert middles(10, 4) == [1, 3, 5, 8]  # edges 0, 2, 4, 7, 9: halves round to even
    assert middles(1, 1) == [0]
    processor = SlowFastProcessor(None, 8, 8, None)
    for count in range(1, 51):
        pixels, slow = processor(video(1) * count)
        assert pixels.shape == (count, 3, 8, 8)
        assert slow.tolist() == torch.linspace(0, count, 11).to(torch.int32).tolist()[:-1]
    assert len(processor(video(1) * 60)[0]) == 50
    with pytest.raises(UserError, match="no frames"):
        processor([])


def test_published_sizes_count() -> None:
    for variant in counted(SlowFastLlava):
        assert isinstance(variant.architecture, SlowFastLlava)
        assert variant.architecture.visual_tokens == 10 * 288 + 50 * 16 == 3680


def test_what_is_not_supported_is_named() -> None:
    with pytest.raises(UserError, match="577 tokens, which are not 576"):
        SlowFastLlava.from_config({"vision_feature_select_strategy": "full"})
