"""The language model alone as a plain LLaMA in Hugging Face's layout, for tools that know nothing of pictures.

    python -m peers.text_checkpoint OUT CHECKPOINT

The weights are links to the checkpoint's own files; only the index, the configuration and a vocabulary are written.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from peers.checkpoint import Checkpoint, made_up


def configuration(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the decoder: what does not speak of pictures."""
    kept = {key: value for key, value in config.items() if not key.startswith(("mm_", "vision_"))}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return {**kept, **ids, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def tokenizer(size: int) -> dict[str, Any]:
    """tokenizer.json of made-up words."""
    vocabulary = {word: number for number, word in enumerate(made_up(size))}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }


def write(out: Path, checkpoint: Checkpoint) -> None:
    """The directory."""
    files = {name: checkpoint.files[name] for name in checkpoint.text()}
    for file in sorted(set(files.values())):
        os.symlink((checkpoint.directory / file).resolve(), out / file)
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    documents = {
        "config.json": configuration(checkpoint.config),
        "model.safetensors.index.json": {"metadata": {}, "weight_map": files},
        "tokenizer.json": tokenizer(checkpoint.config["vocab_size"]),
        "tokenizer_config.json": {**tokens, "unk_token": "<unk>"},
    }
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document))


def main() -> None:
    """The command line."""
    out, directory = map(Path, sys.argv[1:])
    write(out, Checkpoint(directory))


if __name__ == "__main__":
    main()
