"""What the tests of Qwen2-VL and its descendants share: references, pictures, videos, and the comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from graphs.dialogue import Dialogue, Segment
from graphs.model import Model
from graphs.preprocess.image import CLIP_MEAN, CLIP_STD
from graphs.preprocess.patches import PatchProcessor
from graphs.preprocess.picture import Picture, View
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.generate import generate
from tests.numbers import relative_l2
from tests.pretrained import byte_tokenizer, odd_pictures, photographs, randomized, save

MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]
IMAGE, VIDEO = 262, 263  # ids of the third and fourth of them
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 272,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
    "eos_token_id": 257,
    "bos_token_id": 256,
    "pad_token_id": None,
}
BEFORE, AFTER = [1, 5, 60, 7], [9, 33, 4]


def tokenizer() -> Any:
    """Single bytes and the marks of the family."""
    made = byte_tokenizer()
    made.add_tokens(MARKS, special_tokens=True)
    assert made.convert_tokens_to_ids(MARKS[2:4]) == [IMAGE, VIDEO]
    return made


def reference(
    kind: type, config: type, directory: Path, vision: dict[str, Any], text: dict[str, Any], **options: Any
) -> tuple[Any, Qwen2VLImageProcessorPil]:
    """A random model, its image processor and a tokenizer, written into `directory`.

    Sides are up to `options["pixels"]` pixels in all, 64 merged patches where it is not given.
    """
    patch, merge = vision.get("patch_size", 4), vision.get("spatial_merge_size", 2)
    most = options.pop("pixels", 64 * (patch * merge) ** 2)
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 260, "vision_end_token_id": 261}
    made = randomized(kind(config(vision_config=vision, text_config=text, **ids, **options)))
    images = Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        size={"shortest_edge": 4 * (patch * merge) ** 2, "longest_edge": most},
    )
    save(made, directory)
    images.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return made, images


def pictures() -> list[Image.Image]:
    """Photographs, and shapes that are hard to fit."""
    return odd_pictures((90, 9), (13, 400), (5, 7))


def frames(count: int) -> list[Image.Image]:
    """A video of a photograph that moves."""
    china = photographs()[0].resize((80, 60))
    return [china.crop((index, 2 * index, index + 40, 2 * index + 30)) for index in range(count)]


def video_inputs(images: Qwen2VLImageProcessorPil, shown: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """A video as transformers' model takes it, put together from its frames' own patches."""
    time = images.temporal_patch_size
    shown = [*shown, *[shown[-1]] * (-len(shown) % time)]
    made = [images(frame, return_tensors="pt") for frame in shown]
    flat = [one["pixel_values"].unflatten(1, (3, time, -1)) for one in made]  # a frame, repeated `time` times
    steps = [
        torch.stack([flat[start + slot][:, :, slot] for slot in range(time)], dim=2).flatten(1)
        for start in range(0, len(shown), time)
    ]
    grid = made[0]["image_grid_thw"].clone()
    grid[0, 0] = len(steps)
    return {"pixel_values_videos": torch.cat(steps), "video_grid_thw": grid}


def unpatched(made: Picture) -> torch.Tensor:
    """The raw patches of a picture [N, V], normalised as CLIP's are."""
    pixels = torch.from_numpy(made.arrays[0]).flatten(0, 1)
    mean, std = (torch.tensor(values).reshape(1, 3, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels.unflatten(1, (3, -1)) / 255 - mean) / std).flatten(1)


def conversation(given: Sequence[tuple[int, Picture]]) -> tuple[list[Segment], torch.Tensor, torch.Tensor]:
    """Pictures (with the id that marks them) between texts: segments, ids [1, S], and kinds of ids [1, S]."""
    segments: list[Segment] = [BEFORE]
    ids, kinds = list(BEFORE), [0] * len(BEFORE)
    for mark, picture in given:
        assert picture.rope is not None
        count = picture.rope.shape[1]
        segments += [View(picture), AFTER]
        ids += [mark] * count + AFTER
        kinds += [1 if mark == IMAGE else 2] * count + [0] * len(AFTER)
    return segments, torch.tensor([ids]), torch.tensor([kinds], dtype=torch.int)


def joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Inputs of several pictures as those of one call."""
    keys = {key for part in parts for key in part}
    return {key: torch.cat([part[key] for part in parts if key in part]) for key in keys}


def compare(made: Any, images: Qwen2VLImageProcessorPil, model: Model, **timing: torch.Tensor) -> None:
    """Pixels, embeddings, positions, logits and greedy tokens of `model` against those of `made`."""
    processor = model.architecture.image_processor
    assert isinstance(processor, PatchProcessor)
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    sources: list[tuple[int, Picture, dict[str, torch.Tensor]]] = []
    for shown in pictures():
        sources.append((IMAGE, processor.picture(shown), dict(images(shown, return_tensors="pt"))))
    moving = frames(5)
    sources.append((VIDEO, processor.picture(moving), video_inputs(images, moving)))
    lengths = set()
    with torch.no_grad():
        for mark, picture, inputs in sources:
            embeds = torch.from_numpy(runtime.call("vision_encoder", picture.arrays)[0][0])
            read = made.get_image_features if mark == IMAGE else made.get_video_features
            (features,) = read(**inputs).pooler_output
            assert relative_l2(embeds, features) <= 1e-5
            assert len(embeds) <= model.architecture.facts()["visual_tokens"]
            lengths.add(len(embeds))
        assert len(lengths) > 3
        for chosen in ([], [sources[1]], [sources[3], sources[-1], sources[2]]):
            segments, ids, kinds = conversation([(mark, picture) for mark, picture, _ in chosen])
            inputs = joined([part for _, _, part in chosen])
            if chosen:
                inputs |= {"mm_token_type_ids": kinds, **(timing if any(m == VIDEO for m, *_ in chosen) else {})}
            prompt = Dialogue(runtime).embed(segments)
            expected_rope = torch.arange(ids.shape[1]).expand(3, -1)
            if chosen:
                grids = {key: value for key, value in inputs.items() if not key.startswith("pixel")}
                expected_rope = made.model.get_rope_index(ids, **grids)[0][:, 0]
            assert torch.equal(torch.from_numpy(prompt.rope_3S.copy()), expected_rope)
            runtime.reset()
            (logits,) = runtime.call(
                "text_decoder", [prompt.embeds_1SD, np.arange(ids.shape[1]), np.ascontiguousarray(prompt.rope_3S)]
            )
            assert relative_l2(torch.from_numpy(logits), made(ids, **inputs).logits) <= 1e-5
            expected = made.generate(ids, **inputs, do_sample=False, max_new_tokens=5, eos_token_id=None)
            *_, last = generate(runtime, segments, context=model.architecture.facts()["context"], max_new_tokens=5)
            assert last.tokens == expected[0, ids.shape[1] :].tolist()


def renamed(directory: Path, prefixes: dict[str, str], config: dict[str, Any]) -> None:
    """The checkpoint in `directory` again in one file, the first prefix of `prefixes` that a name has exchanged."""
    tensors = {}
    for path in directory.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            old = next(prefix for prefix in prefixes if name.startswith(prefix))
            tensors[prefixes[old] + name.removeprefix(old)] = tensor
        path.unlink()
    for path in directory.glob("*.index.json"):
        path.unlink()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
