"""The checkpoint as GGUF: text.gguf in Q4_0 as llama.cpp's own quantizer makes it, vision.gguf in float16 or Q8_0.

    python -m peers.llama_cpp.convert OUT CHECKPOINT text|f16|q8_0

Tensors are written one at a time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
from gguf.quants import quantize

from peers import load as what
from peers.checkpoint import Checkpoint, made_up
from peers.llama_cpp.names import TEXT_NAMES, renamed, text_tensor, vision_name, vision_tensor
from peers.load import Array

#: statistics of CLIP's pictures, which the published preprocessing has
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def text_keys(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The language model's dimensions, and a vocabulary of made-up words."""
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    words = made_up(config["vocab_size"])
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(words)][: len(words)]  # unknown, control, control, bytes, words
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def vision_keys(writer: gguf.GGUFWriter, config: dict[str, Any], layers: int) -> None:
    """The tower's dimensions; the last of its layers is the one whose output is read."""
    vision = config["vision_config"]
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "ldp")
    writer.add_vision_image_size(vision["image_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
    writer.add_vision_projection_dim(config["hidden_size"])
    writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_vision_image_mean(list(MEAN))
    writer.add_vision_image_std(list(STD))
    writer.add_bool("clip.use_gelu", False)  # CLIP's own, x * sigmoid(1.702 x)


def stream(writer: gguf.GGUFWriter, names: Iterable[str], read: Callable[[str], tuple[str, Array, Any]]) -> None:
    """Write the header, then each tensor; `read` gives its name there, its data and its quantized type or None."""
    kept = list(names)
    for name in kept:
        theirs, data, kind = read(name)
        writer.add_tensor_info(theirs, data.shape, data.dtype, data.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in kept:
        writer.write_tensor_data(read(name)[1])
    writer.close()


def text(out: Path, checkpoint: Checkpoint) -> None:
    """OUT/text.gguf."""
    import llama_cpp

    config = checkpoint.config
    heads = config["num_attention_heads"], config["num_key_value_heads"]

    def read(name: str) -> tuple[str, Array, Any]:
        theirs = renamed(name, TEXT_NAMES)
        assert theirs is not None
        return theirs, text_tensor(name, checkpoint[name], *heads), None

    whole = out / "f16.gguf"
    writer = gguf.GGUFWriter(whole, "llama")
    text_keys(writer, config)
    stream(writer, checkpoint.text(), read)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, what.THREADS
    if llama_cpp.llama_model_quantize(bytes(whole), bytes(out / "text.gguf"), ctypes.byref(options)):
        raise SystemExit("llama_model_quantize failed")
    whole.unlink()


def vision(out: Path, checkpoint: Checkpoint, small: bool) -> None:
    """OUT/vision.gguf, its matrices in float16, or in Q8_0 where it is to be `small`."""
    config = checkpoint.config
    depth, select = config["vision_config"]["num_hidden_layers"], config["mm_vision_select_layer"]
    layers = depth + select + 1 if select < 0 else select
    names = [name for name in checkpoint.files if vision_name(name, layers) is not None]

    def read(name: str) -> tuple[str, Array, Any]:
        theirs, value = vision_name(name, layers), vision_tensor(name, checkpoint[name])
        assert theirs is not None
        if small and value.ndim == 2 and value.dtype == "float16" and value.shape[1] % 32 == 0:
            return theirs, quantize(value.astype("float32"), Q8_0), Q8_0
        return theirs, value, None

    writer = gguf.GGUFWriter(out / "vision.gguf", "clip")
    vision_keys(writer, config, layers)
    stream(writer, names, read)


def main() -> None:
    """The command line."""
    out, directory, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    checkpoint = Checkpoint(directory)
    if kind == "text":
        text(out, checkpoint)
    else:
        vision(out, checkpoint, kind == "q8_0")


if __name__ == "__main__":
    main()
