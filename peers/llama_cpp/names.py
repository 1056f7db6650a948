"""Published tensor names as llama.cpp calls them, and the layout that it wants behind each (facts: its gguf-py, clip).

The two files of a picture-reading model there: the language model, and the tower with its projector.
"""

from __future__ import annotations

import re

from peers.load import Array

TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."

#: a published name's pattern -> llama.cpp's name
TEXT_NAMES = {
    r"model\.embed_tokens\.weight": "token_embd.weight",
    r"model\.norm\.weight": "output_norm.weight",
    r"lm_head\.weight": "output.weight",
    r"model\.layers\.(\d+)\.input_layernorm\.weight": r"blk.\1.attn_norm.weight",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.weight": r"blk.\1.ffn_norm.weight",
    r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.weight": r"blk.\1.attn_\2.weight",
    r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight": r"blk.\1.attn_output.weight",
    r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight": r"blk.\1.ffn_\2.weight",
}
LAYER = rf"{re.escape(TOWER)}encoder\.layers\.(\d+)\."
VISION_NAMES = {
    rf"{re.escape(TOWER)}embeddings\.class_embedding": "v.class_embd",
    rf"{re.escape(TOWER)}embeddings\.patch_embedding\.weight": "v.patch_embd.weight",
    rf"{re.escape(TOWER)}embeddings\.position_embedding\.weight": "v.position_embd.weight",
    rf"{re.escape(TOWER)}pre_layrnorm\.(weight|bias)": r"v.pre_ln.\1",
    rf"{LAYER}self_attn\.([qkv])_proj\.(weight|bias)": r"v.blk.\1.attn_\2.\3",
    rf"{LAYER}self_attn\.out_proj\.(weight|bias)": r"v.blk.\1.attn_out.\2",
    rf"{LAYER}layer_norm(\d)\.(weight|bias)": r"v.blk.\1.ln\2.\3",
    rf"{LAYER}mlp\.fc1\.(weight|bias)": r"v.blk.\1.ffn_up.\2",
    rf"{LAYER}mlp\.fc2\.(weight|bias)": r"v.blk.\1.ffn_down.\2",
    rf"{re.escape(PROJECTOR)}model\.(.+)": r"mm.model.\1",
}


def renamed(name: str, names: dict[str, str]) -> str | None:
    """llama.cpp's name of a tensor; None where it has none."""
    for pattern, theirs in names.items():
        if found := re.fullmatch(pattern, name):
            return found.expand(theirs)
    return None


def vision_name(name: str, layers: int) -> str | None:
    """As `renamed`, for the tower and the projector; None for layers from `layers` on, which are never run."""
    theirs = renamed(name, VISION_NAMES)
    block = re.match(r"v\.blk\.(\d+)\.", theirs or "")
    return None if block and int(block[1]) >= layers else theirs


def interleaved(weight: Array, heads: int) -> Array:
    """Rows of a query or key projection [H*D, K], each head's halves interleaved: llama.cpp rotates neighbours."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def text_tensor(name: str, value: Array, heads: int, key_heads: int) -> Array:
    """A tensor of the language model in llama.cpp's layout."""
    parts = {"q_proj.weight": heads, "k_proj.weight": key_heads}
    turned = next((interleaved(value, count) for part, count in parts.items() if name.endswith(part)), value)
    return turned.astype("float32") if value.ndim == 1 else turned


def vision_tensor(name: str, value: Array) -> Array:
    """A tensor of the tower or the projector in llama.cpp's layout: 1x1 convolutions are matrices there."""
    if name.startswith(PROJECTOR) and value.ndim == 4 and value.shape[2:] == (1, 1):
        value = value[:, :, 0, 0]
    whole = value.ndim == 1 or "position_embedding" in name
    return value.astype("float32") if whole else value
