"""AIMv2 (Fini et al., arXiv 2411.14402): features of pictures, and a LiT checkpoint that scores texts against them.

A checkpoint of a picture tower alone has `image_encoder` only, which gives its features; the native one takes patches
of pictures of any size, which preprocessing cuts. Weights in the layout that transformers writes (`embeddings.*`,
`encoder.*`; LiT: `vision_model.*`, `text_model.*`) or in Apple's (`preprocessor.*`, `trunk.*`, fused queries, keys and
values; LiT: `image_encoder.*`, `text_encoder.*`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from graphs.components.dual import DualEncoder, Similarity
from graphs.components.text.aimv2 import Aimv2TextConfig, Aimv2TextTower
from graphs.components.vision.aimv2 import PLACES, Aimv2Pool, Aimv2Tower, Aimv2VisionConfig, FeatureEncoder
from graphs.config import ConfigReader
from graphs.preprocess.image import ImageProcessor, read_processor
from graphs.preprocess.patched import PatchedProcessor
from graphs.spec import Dim, Method, TensorSpec, Variant
from graphs.weights import Reshape, Rows, Source, by_prefix

#: parts of a layer -> what they are called in checkpoints
PARTS: Mapping[str, str] = {".norm1.": ".rms_norm1.", ".norm2.": ".rms_norm2.", ".mlp.": ".ffn."}

LAYER = r"trunk\.blocks\.(?P<layer>\d+)\."

#: Apple's names of the parts of a tower -> transformers'
ORIGINAL: tuple[tuple[str, str], ...] = (
    (r"preprocessor\.patchifier\.proj\.", "embeddings.patch_embed."),
    (r"preprocessor\.patchifier\.norm\.", "embeddings.rms_norm."),
    (r"preprocessor\.(pos_embed|positional_embedding)", "embeddings.position_embedding.weight"),
    (r"preprocessor\.text_embedding\.", "embeddings.token_embedding."),
    (LAYER + r"attn\.proj\.", r"encoder.layers.\g<layer>.attention.out_proj."),
    (LAYER + r"attn\.", r"encoder.layers.\g<layer>.attention."),
    (LAYER + r"mlp\.fc1\.", r"encoder.layers.\g<layer>.ffn.gate_proj."),
    (LAYER + r"mlp\.fc2\.", r"encoder.layers.\g<layer>.ffn.down_proj."),
    (LAYER + r"mlp\.fc3\.", r"encoder.layers.\g<layer>.ffn.up_proj."),
    (LAYER + r"norm_", r"encoder.layers.\g<layer>.rms_norm"),
    (r"trunk\.post_trunk_norm\.", "rms_norm."),
    (r"head\.k\.", "head.k_proj."),
    (r"head\.v\.", "head.v_proj."),
    (r"head\.linear\.", "head.output_proj."),
)


def renamed() -> tuple[tuple[str, str], ...]:
    """`ORIGINAL` for the towers of LiT, and for a tower alone, which is named as LiT's is."""
    towers = {r"image_encoder\.": "vision_model.", r"text_encoder\.": "text_model.", "": "vision_model."}
    return tuple(
        (prefix + pattern, tower + replacement) for prefix, tower in towers.items() for pattern, replacement in ORIGINAL
    )


@dataclass(frozen=True)
class Aimv2(DualEncoder):
    """Configuration of one AIMv2.

    `text`: None for a picture tower alone. `max_scale`: the bound on the factor of scores. `original`: from Apple's
    layout, whose attention is fused.
    """

    name = "aimv2"
    aliases = (
        *renamed(),
        (r"(vision_model\.|image_encoder\.)", "vision_model."),
        (r"text_encoder\.", "text_model."),
        (r"image_projector\.", "visual_projection."),
        (r"text_projector\.", "text_projection."),
        (r"log_logit_scale", "logit_scale"),
        (r"(?=(embeddings|encoder|rms_norm|head)\.)", "vision_model."),
    )
    unused = (r"(text|vision)_model\.embeddings\.position_ids",)

    vision: Aimv2VisionConfig
    text: Aimv2TextConfig | None = None  # type: ignore[assignment]
    processor: ImageProcessor | None = None  # None: CLIP's, at the tower's size
    max_scale: float = 100.0
    original: bool = False

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        large = Aimv2VisionConfig(use_head=False)
        huge = replace(large, hidden_size=1536, intermediate_size=4096, num_attention_heads=12)
        giant = replace(large, hidden_size=3072, intermediate_size=8192, num_attention_heads=24, image_size=448)
        native = replace(large, is_native=True)
        lit = cls(Aimv2VisionConfig(), Aimv2TextConfig(projection_dim=768))
        tiny = Aimv2VisionConfig(64, 128, 2, 4, 48, 8)
        tiny_text = Aimv2TextConfig(48, 96, 2, 4, 256, 20, eos_token_id=255, projection_dim=32, pad_token_id=255)
        hub = "apple/aimv2"
        return (
            Variant("tiny", cls(tiny, tiny_text)),
            Variant("tiny-features", cls(tiny)),
            Variant("tiny-native", cls(replace(tiny, use_head=False, is_native=True))),
            Variant("aimv2-large-224", cls(large), f"{hub}-large-patch14-224", 309_000_000),
            Variant("aimv2-large-224-lit", lit, f"{hub}-large-patch14-224-lit", 435_000_000),
            Variant("aimv2-large-native", cls(native), f"{hub}-large-patch14-native", 309_000_000),
            Variant("aimv2-huge-224", cls(huge), f"{hub}-huge-patch14-224", 681_000_000),
            Variant("aimv2-3b-448", cls(giant), f"{hub}-3B-patch14-448", 2_720_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        paired = bool({"vision_config", "text_config"} & config.keys())
        section = reader.section("vision_config") if paired or "hidden_size" not in reader else reader
        original = "use_bias" in section
        # A tower alone has a head only where its file is one that transformers writes, and says so or nothing.
        vision = Aimv2VisionConfig.from_reader(section, head=paired or not original)
        text = None
        if paired:
            width = reader.int("projection_dim", Aimv2TextConfig().projection_dim)
            text = Aimv2TextConfig.from_reader(reader.section("text_config"), width)
            if not vision.use_head:
                raise section.error("use_head is false; without the head a picture has no embedding to score")
            if vision.is_native:
                raise section.error("is_native is true; pictures are scored at the tower's size")
        processor = read_processor(preprocessor, vision.image_size) if not vision.is_native else None
        if vision.is_native and preprocessor:
            processor = ImageProcessor.from_config(preprocessor)
        return cls(vision, text, processor, reader.float("max_logit_scale", 100.0, low=1.0), original)

    @property
    def pixels(self) -> ImageProcessor:
        side = self.vision.image_size
        given = self.processor or ImageProcessor(side, crop_size=(side, side))
        if not self.vision.is_native:
            return given
        return PatchedProcessor(**asdict(given), side=self.vision.patch_size, most=PLACES)

    def towers(self) -> tuple[nn.Module, nn.Module]:
        assert self.text is not None
        return Aimv2Tower(self.vision), Aimv2TextTower(self.text)

    def head(self) -> tuple[nn.Module, nn.Module]:
        assert self.text is not None
        return Aimv2Pool(self.vision), nn.Linear(self.vision.hidden_size, self.text.projection_dim, bias=False)

    def similarity(self) -> Similarity:
        return Similarity(shape=(), bias=False, most=self.max_scale)

    def facts(self) -> dict[str, Any]:
        if self.text is not None:
            return super().facts()
        return {"image_size": self.vision.image_size, "embedding_size": self.vision.hidden_size}

    def build(self) -> nn.Module:
        if self.text is not None:
            return super().build()
        root = nn.Module()
        pool = Aimv2Pool(self.vision) if self.vision.use_head else None
        root.image_encoder = FeatureEncoder(self.pixels, Aimv2Tower(self.vision), pool)
        return root

    def methods(self, root: nn.Module) -> tuple[Method, ...]:
        if self.text is not None:
            return super().methods(root)
        vision, width = self.vision, self.vision.hidden_size
        count: Dim | int = Dim("patches", 1, PLACES**2) if vision.is_native else vision.patches
        outputs = [TensorSpec("image_features", (1, count, width))]
        if vision.use_head:
            outputs.append(TensorSpec("image_embeds", (1, width)))
        side = vision.patch_size if vision.is_native else vision.image_size
        pictures = count if vision.is_native else 1
        inputs = [TensorSpec("pixel_values", (pictures, 3, side, side), torch.uint8, "pixels")]
        if vision.is_native:
            inputs.append(TensorSpec("patch_position", (count, 2), torch.int64, "ids", PLACES))
        return (Method("image_encoder", root.get_submodule("image_encoder"), tuple(inputs), tuple(outputs)),)

    def source(self, parameter: str) -> Source:
        for ours, theirs in PARTS.items():
            parameter = parameter.replace(ours, theirs)
        found = by_prefix(
            parameter,
            {
                "image_encoder.tower.layers.": "vision_model.encoder.layers.",
                "image_encoder.tower.": "vision_model.",
                "image_encoder.pool.": "vision_model.head.",
                "image_encoder.projection.": "visual_projection.",
                "text_encoder.layers.": "text_model.encoder.layers.",
                "text_encoder.projection.": "text_projection.",
                "text_encoder.rms_norm.": "text_model.rms_norm.",
                "text_encoder.": "text_model.embeddings.",
                "similarity.": "",
            },
        )
        assert isinstance(found.key, str)
        tower = self.vision if found.key.startswith("vision_model.") else self.text
        assert tower is not None
        if found.key == "vision_model.embeddings.patch_embed.weight" and self.vision.is_native:
            return Source(found.key, (Reshape((self.vision.hidden_size, 3 * self.vision.patch_size**2)),))
        if found.key.endswith(".position_embedding.weight"):  # Apple's pictures have a batch dimension there
            return Source(found.key, (Reshape((-1, tower.hidden_size)),))
        place, _, kind = found.key.rpartition("_proj.")
        if self.original and place.endswith((".attention.q", ".attention.k", ".attention.v")):
            start = "qkv".index(place[-1]) * tower.hidden_size
            return Source(f"{place[:-1]}qkv.{kind}", (Rows(start, start + tower.hidden_size),))
        return found


ARCHITECTURE = Aimv2
