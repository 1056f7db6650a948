"""Random models of transformers' classes, written as it writes them, tokenizer and processor included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<s>", "</s>", "<pad>", "<image>")


def randomized(model: Any, std: float = 0.2, seed: int = 4) -> Any:
    """`model` in eval mode with every parameter drawn anew."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model.eval()


def byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, 256 and the special tokens, which have the ids from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIALS[:3], strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=[SPECIALS[3]], **{**named, **options}
    )


def photographs() -> list[Image.Image]:
    """Real photographs of several sizes and shapes."""
    china, flower = (Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower"))
    return [china, flower.rotate(90, expand=True), china.crop((100, 50, 131, 400)), flower.resize((30, 20))]


def odd_pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """The photographs, and noise of the given sizes (height, width), up to 90 x 400: shapes that are hard to fit."""
    noise = np.random.default_rng(1).integers(0, 256, (90, 400, 3), np.uint8)
    return [*photographs(), *(Image.fromarray(noise[:height, :width]) for height, width in sizes)]


def raw_pixels(side: int, count: int = 1) -> list[np.ndarray]:
    """Random pictures, uint8 [1, 3, side, side]."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (1, 3, side, side), np.uint8) for _ in range(count)]


def save(model: Any, directory: Path) -> Path:
    """`model.save_pretrained`, in several shards."""
    model.save_pretrained(directory, max_shard_size="100KB")
    return directory
