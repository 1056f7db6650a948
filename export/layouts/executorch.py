"""What ExecuTorch's stock `MultimodalRunner` reads of a .pte beside its methods: constants, each a method of its own.

The runner reads the lengths, the `enable_` and `use_` flags and `get_eos_ids` (extension/llm/runner/constants.h of
ExecuTorch 1.4). `modality` and `get_n_layers` are optimum-executorch's; a picture's size and tokens are for other apps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

#: constant method -> the key of the metadata that it tells
FROM_METADATA: dict[str, str] = {
    "get_max_seq_len": "context",
    "get_max_context_len": "context",
    "get_eos_ids": "eos_ids",
    "get_bos_id": "bos_id",
    "get_vocab_size": "vocab_size",
    "get_n_layers": "layers",
    "get_visual_tokens": "visual_tokens",
    "get_image_size": "image_size",
}

#: what is so for every decoder that this target lowers: positions are a vector and the cache is the method's own
DECODER: dict[str, Any] = {
    "enable_dynamic_shape": True,
    "use_kv_cache": True,
    "use_sdpa_with_kv_cache": False,
}


def constant_methods(methods: Collection[str], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Constant methods by name, from what the metadata has; a decoder's only where there is a `text_decoder`."""
    told = {name: metadata.get(key) for name, key in FROM_METADATA.items()}
    found = {name: value for name, value in told.items() if value is not None and value != []}
    if "text_decoder" not in methods:
        return found
    modality = {"modality": "vision"} if "vision_encoder" in methods else {}
    return {**found, **DECODER, **modality}
