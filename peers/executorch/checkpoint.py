"""The language model as ExecuTorch's own flow wants it: Meta's names in a .pth, and params.json.

python -m peers.executorch.checkpoint OUT CHECKPOINT
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from peers.checkpoint import Checkpoint

#: a part of a published name -> what Meta's has there
PARTS = (
    ("model.embed_tokens.", "tok_embeddings."),
    ("lm_head.", "output."),
    ("model.", ""),
    ("self_attn.q_proj", "attention.wq"),
    ("self_attn.k_proj", "attention.wk"),
    ("self_attn.v_proj", "attention.wv"),
    ("self_attn.o_proj", "attention.wo"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("post_attention_layernorm", "ffn_norm"),
    ("input_layernorm", "attention_norm"),
)


def meta_name(name: str) -> str:
    """A tensor's name in Meta's layout."""
    for part, theirs in PARTS:
        name = re.sub(rf"(^|(?<=\.)){re.escape(part)}", theirs, name, count=1)
    return name


def parameters(config: dict[str, Any]) -> dict[str, Any]:
    """params.json. Rotation as Hugging Face's, whose weights these are."""
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "hidden_dim": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "use_hf_rope": True,
    }


def main() -> None:
    """The command line."""
    import torch

    out, directory = map(Path, sys.argv[1:])
    checkpoint = Checkpoint(directory)
    (out / "params.json").write_text(json.dumps(parameters(checkpoint.config)))
    tensors = {meta_name(name): torch.from_numpy(checkpoint[name]) for name in checkpoint.text()}
    torch.save(tensors, out / "checkpoint.pth")


if __name__ == "__main__":
    main()
