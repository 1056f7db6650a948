"""VideoLLaMA 3 (Zhang et al., arXiv 2501.13106): a SigLIP tower with 2-D rotary positions, a two-layer MLP, Qwen2.

Pictures of any size, a patch an embedding; frames of videos at a quarter of that, embeddings of still parts left out.
Preprocessing decides which patches make which embedding; the graph averages. Weights in the layout of transformers
(`model.vision_model.*`, `model.projector.*`, `model.language_model.*`) or in that of the authors
(https://github.com/DAMO-NLP-SG/VideoLLaMA3: `model.vision_encoder.*`, `model.mm_projector.*`, `model.layers.*`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphs.components.activations import ACTIVATIONS
from graphs.components.connectors.mlp import MLPProjector
from graphs.components.image_text import MAX_CONTEXT, ImageTextDecoder
from graphs.components.text.config import FAMILIES, TextConfig
from graphs.components.vision.patches import PatchTower, PatchVisionConfig
from graphs.config import ConfigReader
from graphs.preprocess.prompt import PromptTemplate
from graphs.preprocess.thinned import TAPS, ThinningProcessor
from graphs.spec import Dim, TensorSpec, Variant
from graphs.weights import Reshape, Source, by_prefix

TEMPLATE = PromptTemplate(
    system=(
        "<|im_start|>system\nYou are VideoLLaMA3 created by Alibaba DAMO Academy, a helpful assistant to help people "
        "understand images and videos.<|im_end|>\n"
    ),
    user="<|im_start|>user\n",
    assistant="<|im_end|>\n<|im_start|>assistant\n",
    image="<|image_pad|>",
)

TEXTS = ("llama", "mistral", "qwen2")
PROCESSOR = ThinningProcessor()


class ThinnedEncoder(nn.Module):
    """Patches [N, V] uint8, rows and columns [N, 2], frames [N], patches of each embedding [M, TAPS] to [1, M, D]."""

    def __init__(self, tower: PatchTower, vision: PatchVisionConfig, projector: MLPProjector) -> None:
        super().__init__()
        self.tower, self.projector = tower, projector
        self.post_layernorm = nn.LayerNorm(vision.hidden_size, vision.layer_norm_eps)

    def forward(self, pixel_values: Tensor, patch_position: Tensor, frames: Tensor, units: Tensor) -> Tensor:
        x_ND = self.post_layernorm(self.tower(pixel_values, patch_position, frames))
        taken_MTD = x_ND.index_select(0, units.reshape(-1)).reshape(-1, TAPS, x_ND.shape[-1])
        return self.projector(taken_MTD.mean(1)).unsqueeze(0)


@dataclass(frozen=True)
class VideoLlama3(ImageTextDecoder):
    """Configuration of one VideoLLaMA 3. `processor`: the checkpoint's; a bundle's may take smaller pictures only."""

    name = "videollama3"
    aliases = (
        (r"model\.vision_encoder\.(vision_encoder\.)?", "vision_model."),
        (r"model\.mm_projector\.", "projector."),
        (r"model\.vision_model\.", "vision_model."),
        (r"model\.projector\.", "projector."),
        (r"model\.language_model\.", "model."),
    )
    unused = (
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"lm_head\.weight",  # a tied head saved all the same
    )

    vision: PatchVisionConfig
    text: TextConfig
    processor: ThinningProcessor = PROCESSOR
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        vision = tower(1152, 4304, 27, 16, 14)
        two = replace(FAMILIES["qwen2"], **sizes(1536, 8960, 28, 12, 2, 151936), tie_word_embeddings=True)
        seven = replace(FAMILIES["qwen2"], **sizes(3584, 18944, 28, 28, 4, 152064))
        tiny_text = replace(FAMILIES["qwen2"], **sizes(64, 128, 2, 4, 2, 256), max_position_embeddings=192)
        tiny_pictures = replace(
            PROCESSOR, patch_size=4, min_pixels=64, max_pixels=1024, video_min_pixels=256, video_max_pixels=4096
        )
        hub = "DAMO-NLP-SG/VideoLLaMA3"
        return (
            Variant("tiny", cls(tower(32, 64, 2, 2, 4), tiny_text, tiny_pictures)),
            Variant("videollama3-2b", cls(vision, two), f"{hub}-2B", 1_960_000_000),
            Variant("videollama3-2b-image", cls(vision, two), f"{hub}-2B-Image", 1_960_000_000),
            Variant("videollama3-7b", cls(vision, seven), f"{hub}-7B", 8_040_000_000),
            Variant("videollama3-7b-image", cls(vision, seven), f"{hub}-7B-Image", 8_040_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        original = "vision_encoder_config" in reader
        section = reader.section("vision_encoder_config" if original else "vision_config")
        given = reader if original else reader.section("text_config")
        family = "qwen2" if original else given.choice("model_type", TEXTS, default="qwen2")
        tied = given.bool("tie_word_embeddings", False) or reader.bool("tie_word_embeddings", False)
        text = TextConfig.from_reader(
            ConfigReader({**given.values, "tie_word_embeddings": tied}, given.where), FAMILIES[family]
        )
        if original:
            reader.choice("mm_projector_type", ("mlp2x_gelu",), default="mlp2x_gelu")
        vision = read_vision(section)
        image = "<image>" if original else "<|image_pad|>"
        return cls(vision, text, read_processor(preprocessor or {}, vision.patch_size, image))

    @property
    def visual_tokens(self) -> int:
        """The most image embeddings that one picture or video becomes: half of the context at the most."""
        used = self.processor
        video = used.video_max_pixels // (used.patch_size * used.video_merge_size) ** 2
        return max(1, min(max(used.max_pixels // used.factor**2, video), self.context // 2))

    def facts(self) -> dict[str, Any]:
        return {key: value for key, value in super().facts().items() if key != "image_size"}

    @property
    def image_size(self) -> int:
        """Side of the largest square that is not made smaller; pictures of other shapes are taken as they are."""
        return int(self.visual_tokens**0.5) * self.processor.factor

    @property
    def patches(self) -> int:
        """The most patches of one picture or video."""
        return TAPS + self.visual_tokens * max(self.processor.merge_size, self.processor.video_merge_size) ** 2

    @property
    def positions(self) -> int:
        """Rows or columns of patches that a picture may have: it may be one embedding wide."""
        return self.visual_tokens * max(self.processor.merge_size, self.processor.video_merge_size)

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        patches = Dim("patches", TAPS, self.patches)
        rows = Dim("visual_tokens", 1, self.visual_tokens)
        return (
            TensorSpec("pixel_values", (patches, self.vision.values), torch.uint8, "pixels"),
            TensorSpec("patch_position", (patches, 2), torch.int64, "ids", self.positions),
            TensorSpec("frames", (patches,), torch.int64, "ids", 2),
            TensorSpec("units", (rows, TAPS), torch.int64, "ids", TAPS),
        )

    def image_embeds(self) -> TensorSpec:
        return TensorSpec("image_embeds", (1, Dim("visual_tokens", 1, self.visual_tokens), self.text.hidden_size))

    def encoder(self) -> nn.Module:
        return ThinnedEncoder(
            PatchTower(self.vision, self.image_processor, self.positions),
            self.vision,
            MLPProjector(self.vision.hidden_size, self.text.hidden_size),
        )

    def source(self, parameter: str) -> Source:
        embedding = "vision_model.embeddings.patch_embedding."
        if parameter == "vision_encoder.tower.embedding.projection.weight":
            return Source(f"{embedding}weight", (Reshape((self.vision.hidden_size, self.vision.values)),))
        names = {".attn.": ".self_attn.", ".norm1.": ".layer_norm1.", ".norm2.": ".layer_norm2."}
        renamed = parameter
        for ours, theirs in names.items() if parameter.startswith("vision_encoder.tower.layers.") else ():
            renamed = renamed.replace(ours, theirs)
        return by_prefix(
            renamed,
            {
                "vision_encoder.tower.embedding.projection.": embedding,
                "vision_encoder.tower.layers.": "vision_model.encoder.layers.",
                "vision_encoder.post_layernorm.": "vision_model.post_layernorm.",
                "vision_encoder.projector.linear_1.": "projector.readout.0.",
                "vision_encoder.projector.linear_2.": "projector.readout.2.",
                "token_embedding.": "model.embed_tokens.",
                "text_decoder.lm_head.": "model.embed_tokens." if self.text.tie_word_embeddings else "lm_head.",
                "text_decoder.": "model.",
            },
        )

    @property
    def image_processor(self) -> ThinningProcessor:
        return replace(self.processor, max_tokens=self.visual_tokens)

    @property
    def template(self) -> PromptTemplate:
        return replace(TEMPLATE, image=self.processor.image)


def tower(width: int, inner: int, layers: int, heads: int, patch: int) -> PatchVisionConfig:
    """A tower of the family, with what its published sizes share."""
    return PatchVisionConfig(
        width, inner, layers, heads, patch, frames=1, merge=1, hidden_act="gelu_pytorch_tanh", patch_bias=True
    )


def sizes(width: int, inner: int, layers: int, heads: int, key_value_heads: int, vocabulary: int) -> dict[str, Any]:
    """The sizes of a decoder by name, with the base of rotary positions that Qwen2.5 has."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "rope_theta": 1e6,
    }


def read_vision(config: ConfigReader) -> PatchVisionConfig:
    """The tower of a VideoLlama3VisionConfig's JSON. Raises: UserError."""
    config.int("num_channels", 3, low=3, high=3)
    rope = config.section("rope_parameters")
    rope.choice("rope_type", ("axial",), default="axial")
    vision = replace(
        tower(
            config.int("hidden_size", 768),
            config.int("intermediate_size", 3072),
            config.int("num_hidden_layers", 12, high=1024),
            config.int("num_attention_heads", 12, high=1024),
            config.int("patch_size", 16, high=1024),
        ),
        hidden_act=config.choice("hidden_act", ACTIVATIONS, default="gelu_pytorch_tanh"),
        layer_norm_eps=config.float("layer_norm_eps", 1e-6, high=1.0),
        rope_theta=rope.float("rope_theta", 10000.0, low=1.0, high=1e12),
    )
    vision.check(config)
    return vision


def read_processor(preprocessor: Mapping[str, Any], patch: int, image: str) -> ThinningProcessor:
    """Of transformers' keys, or of the authors', who count patches of pictures instead of pixels. Raises: UserError."""
    reader = ConfigReader(preprocessor, "preprocessor_config.json")
    counts = {
        f"{bound}_pixels": reader.int(f"{bound}_tokens", high=1 << 20) * patch**2
        for bound in ("min", "max")
        if f"{bound}_tokens" in reader
    }
    made = replace(PROCESSOR, patch_size=patch, merge_size=reader.int("merge_size", 1, high=64), image=image)
    return made.read({**counts, **preprocessor})


ARCHITECTURE = VideoLlama3
