"""Aria from checkpoints that transformers' class wrote: the same patches, embeddings, logits, tokens and text."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AriaConfig, AriaForConditionalGeneration, AriaProcessor, AriaTextConfig
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

from export.gate import Limit
from export.pipeline import ExportOptions, export
from export.stability import part
from export.stages import silent
from export.targets.onnx_graph import emit, write
from export.targets.onnx_reference import evaluate
from export.targets.state_io import explicit_state
from graphs.architectures.aria import ARIA_25B, QUERIES, Aria
from graphs.components.text.experts import RoutedExperts
from graphs.dialogue import Dialogue
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.aria import RESOLUTIONS
from graphs.preprocess.picture import from_json
from graphs.preprocess.prompt import read
from graphs.preprocess.tokenizer import load_tokenizer
from graphs.trace import count_parameters, trace
from quant.precision import CastFloats
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from runtimes.manifest import Bundle
from runtimes.session import Session
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, odd_pictures, photographs, randomized, save

#: transformers' image processor takes squares of 490 and 980 pixels alone
SIDE = 490
VISION: dict[str, Any] = {
    "model_type": "idefics3_vision",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 49,
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "moe_num_experts": 7,
    "moe_topk": 3,
    "moe_num_shared_experts": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "odd, tied, fewer queries": {
        "vision": {**VISION, "hidden_size": 40, "num_attention_heads": 5, "image_size": 600, "patch_size": 60},
        "text": {**TEXT, "num_key_value_heads": 4, "hidden_act": "gelu", "moe_num_experts": 5, "moe_topk": 1},
        "queries": {64: 3, 100: 6},
        "vision_feature_layer": -2,
        "tie_word_embeddings": True,
    },
    "split": {"split": True},
}


def reference(
    directory: Path,
    vision: dict[str, Any] = VISION,
    text: dict[str, Any] = TEXT,
    queries: dict[int, int] = {100: 6},  # noqa: B006 (only read)
    split: bool = False,
    **options: Any,
) -> tuple[Any, AriaProcessor]:
    """A model and its processor, both written into `directory`."""
    tokenizer = byte_tokenizer(extra_special_tokens={"image_token": "<|img|>"})
    resolutions = [[300, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    images = AriaImageProcessorPil(max_image_size=SIDE, split_image=split, split_resolutions=resolutions)
    tokens = queries[(SIDE // vision["patch_size"]) ** 2]
    processor = AriaProcessor(images, tokenizer, size_conversion={SIDE: tokens})
    config = AriaConfig(
        vision_config=copy.copy(vision),
        text_config=AriaTextConfig(**text),
        projector_patch_to_query_dict=queries,
        image_token_index=tokenizer.image_token_id,
        **options,
    )
    made = randomized(AriaForConditionalGeneration(config))
    save(made, directory)
    processor.save_pretrained(directory)
    return made, processor


def pictures() -> list[Image.Image]:
    """Photographs, and shapes that are stretched."""
    return odd_pictures((90, 7), (13, 400), (24, 24))


def patches(pixels: torch.Tensor, mask: torch.Tensor, side: int) -> torch.Tensor:
    """Patches [N, 3, side, side] of a padded picture [3, H, W] that show any pixel that `mask` [H, W] marks."""
    most = pixels.shape[1] // side
    rows, columns = (min(-(-int(line.sum()) // side), most) for line in (mask[:, 0], mask[0]))
    cut = pixels[:, : rows * side, : columns * side].reshape(3, rows, side, columns, side)
    return cut.permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    made, processor = reference(tmp_path, **CASES[case])
    settings = {"max_image_size": SIDE, "split_image": CASES[case].get("split", False)}
    model = load_model(Request("aria", checkpoint=str(tmp_path)))
    architecture = model.architecture
    assert isinstance(architecture, Aria)
    runtime = EagerRuntime(trace(architecture, model.weights))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    prepare = architecture.image_processor
    with torch.no_grad():
        for image in pictures():
            given = prepare.picture(image).arrays
            inputs = processor.image_processor(image, return_tensors="pt")
            assert len(given[0]) == inputs.pop("num_crops")
            for ours, real, pixels, mask in zip(given[0], given[2], *inputs.values(), strict=True):
                wanted = patches(pixels, mask, prepare.side)
                assert relative_l2((torch.from_numpy(ours[real == 1]) / 255 - 0.5) / 0.5, wanted) <= 1e-6
                assert prepare.patches[0] <= real.sum() <= prepare.patches[1]
            (image_embeds,) = runtime.call("vision_encoder", given)
            layer = made.config.vision_feature_layer
            features = made.get_image_features(**inputs, vision_feature_layer=layer).pooler_output
            assert image_embeds.shape[1] <= architecture.visual_tokens
            assert relative_l2(torch.from_numpy(image_embeds[0]), features.flatten(0, 1)) <= 1e-5
        for count in (0, 1, 2):
            seen = photographs()[1 : 1 + count]  # of one shape: transformers counts the squares of the first alone
            words = architecture.template.render("Hm?", count).replace("<|img|>", "<fim_prefix><|img|><fim_suffix>")
            inputs = processor(text=words, images=seen or None, return_tensors="pt", **settings)
            pieces = read(architecture.template, "Hm?", [prepare.picture(image) for image in seen], tokenizer)
            prompt = Dialogue(runtime).embed(pieces)
            runtime.reset()
            (logits,) = runtime.call("text_decoder", [prompt.embeds_1SD, np.arange(prompt.length)])
            assert relative_l2(torch.from_numpy(logits), made(**inputs).logits) <= 1e-5
            expected = made.generate(**inputs, do_sample=False, max_new_tokens=5, eos_token_id=None)
            *_, last = generate(runtime, pieces, context=architecture.context, max_new_tokens=5)
            assert last.tokens == expected[0, prompt.length :].tolist()


LAYOUTS: dict[str, list[tuple[str, str]]] = {
    "in memory": [
        (r"language_model\.lm_head", "lm_head"),
        (r"language_model\.model\.(.*)experts\.fc1\.weight", r"model.language_model.\1experts.gate_up_proj"),
        (r"language_model\.model\.(.*)experts\.fc2\.weight", r"model.language_model.\1experts.down_proj"),
        (r"language_model\.model\.", "model.language_model."),
        (r"vision_tower\.", "model.vision_tower."),
        (r"multi_modal_projector\.", "model.multi_modal_projector."),
    ],
    "original": [
        (r"vision_tower\.", "vision_tower.vision_model."),
        (r"multi_modal_projector\.layer_norm\.", "multi_modal_projector.ln_ffn."),
        (r"multi_modal_projector\.feed_forward\.", "multi_modal_projector.ffn."),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_public_layouts_hold_the_same(layout: str, tmp_path: Path) -> None:
    made, _ = reference(tmp_path / "a")
    made.save_pretrained(tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        pattern, new = next((rule for rule in LAYOUTS[layout] if re.match(rule[0], name)), ("", ""))
        renamed[re.sub(pattern, new, name, count=1) if pattern else name] = tensor
    assert set(renamed) != set(tensors)
    save_file(renamed, tmp_path / "b" / "model.safetensors")
    one, other = (load_model(Request("aria", checkpoint=str(tmp_path / name))) for name in "ab")
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_tokens_meet_their_experts_alone() -> None:
    """As a loop over tokens and over the experts chosen for each, which is how a mixture is defined."""
    text = Aria.variants()[0].architecture.text  # type: ignore[attr-defined]
    torch.manual_seed(0)
    experts = RoutedExperts(text)
    x_BSD = torch.randn(1, 9, text.hidden_size)
    inner = text.intermediate_size
    with torch.no_grad():
        found = experts(x_BSD)[0]
        shares = experts.shares(x_BSD)[0]
        for token, state in enumerate(x_BSD[0]):
            scores, chosen = experts.router(state).topk(text.moe_topk)
            assert shares[token].nonzero().flatten().tolist() == sorted(chosen.tolist())
            expected = torch.zeros(text.hidden_size)
            for share, index in zip(scores.softmax(0), chosen.tolist(), strict=True):
                part = slice(index * inner, (index + 1) * inner)
                hidden = torch.nn.functional.silu(experts.gate_proj.weight[part] @ state)
                hidden = hidden * (experts.up_proj.weight[part] @ state)
                expected += share * (experts.down_proj.weight[:, part] @ hidden)
            assert relative_l2(found[token], expected) <= 1e-5


def test_ties_are_decided_for_as_many_experts_as_are_asked_for() -> None:
    text = Aria.variants()[0].architecture.text  # type: ignore[attr-defined]
    experts = RoutedExperts(text)
    with torch.no_grad():
        experts.router.weight.zero_()
        shares = experts.shares(torch.randn(1, 5, text.hidden_size))
    assert (shares > 0).sum(-1).tolist() == [[text.moe_topk] * 5]


def test_experts_in_halves_stay_the_chosen_ones_where_a_runtime_rounds_less(tmp_path: Path) -> None:
    """onnxruntime computes halves in float32 and rounds some in between: a score may then differ from itself."""
    model = load_model(Request("aria", "tiny"))
    traced = trace(model.architecture, model.weights)
    halves = explicit_state(CastFloats(torch.float16).run(part(traced, ["text_decoder"])))
    write(emit(halves, "text_decoder"), tmp_path / "m.onnx")
    assert "relative L2" in evaluate(halves, "text_decoder", tmp_path / "m.onnx", Limit(5e-3))


def test_bundles_answer_as_transformers_does(tmp_path: Path) -> None:
    made, processor = reference(tmp_path / "made")
    request = Request("aria", checkpoint=str(tmp_path / "made"), max_context=160)
    bundle = export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent)
    session = Session.open(Bundle.open(bundle))
    for seen in (photographs()[:1], photographs()[1:3]):
        answer, _ = session.answer("Hm?", seen, max_new_tokens=8)
        words = session.template.render("Hm?", len(seen)).replace("<|img|>", "<fim_prefix><|img|><fim_suffix>")
        inputs = processor(text=words, images=seen, return_tensors="pt", max_image_size=SIDE)
        tokens = made.generate(**inputs, do_sample=False, max_new_tokens=8)
        expected = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == expected.strip()


def test_published_sizes() -> None:
    architecture = next(v.architecture for v in Aria.variants() if v.name == "aria-25b")
    assert isinstance(architecture, Aria)
    assert count_parameters(architecture) == pytest.approx(25_300_000_000, rel=0.01)
    processor = architecture.image_processor
    assert (processor.size, processor.tokens, processor.patches) == (980, 256, (24 * 70, 4900))
    small = Aria.from_config({"vision_config": {"image_size": 980, "patch_size": 14}}, {"max_image_size": 490})
    assert (small.queries, small.visual_tokens, small.image_processor.patches) == (QUERIES, 128, (24 * 35, 1225))
    assert [list(pair) for pair in RESOLUTIONS] == AriaImageProcessorPil().split_resolutions
    split = Aria.from_config({"vision_config": {"image_size": 980, "patch_size": 14}}, {"split_image": True})
    assert split.image_processor.pictures == (1, 4)
    assert from_json(split.image_processor.to_json()) == split.image_processor


def test_the_hubs_keys_are_read() -> None:
    """What the authors' files say: the width of an expert has a key of its own, and the other means something else."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 13568,
        "max_position_embeddings": 65536,
        "model_type": "aria_moe_lm",
        "moe_intermediate_size": 1664,
        "moe_num_experts": 64,
        "moe_topk": 6,
        "num_attention_heads": 20,
        "num_hidden_layers": 28,
        "num_key_value_heads": 20,
        "rope_theta": 5000000,
        "vocab_size": 100352,
    }
    vision = {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "model_type": "aria_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    }
    queries = {"1225": 128, "4900": 256}
    config = {"text_config": text, "vision_config": vision, "projector_patch_to_query_dict": queries}
    found, published = Aria.from_config(config), Aria.variants()[1].architecture
    assert isinstance(published, Aria)
    assert (found.text, found.vision, found.queries) == (ARIA_25B, published.vision, published.queries)
    assert Aria.from_config({**config, "text_config": {**text, "intermediate_size": 1664}}).text == ARIA_25B


@pytest.mark.parametrize(
    ("config", "preprocessor", "words"),
    [
        ({"vision_config": {"model_type": "clip_vision_model"}}, {}, "aria_vision_model"),
        ({"text_config": {"model_type": "llama"}}, {}, "aria_text"),
        ({"text_config": {"moe_topk": 9}}, {}, "moe_topk is 9"),
        ({}, {"max_image_size": 700}, "max_image_size is 700, which the projector has no queries for"),
        ({"projector_patch_to_query_dict": {"many": 3}}, {}, "must be numbers of patches"),
        ({}, {"max_image_size": 980, "split_image": True, "split_resolutions": [[1]]}, "split_resolutions"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], preprocessor: dict[str, Any], words: str) -> None:
    vision = {"image_size": 980, "patch_size": 14}
    with pytest.raises(UserError, match=words):
        Aria.from_config({"vision_config": vision, **config}, preprocessor)
