"""Aria (Li et al., arXiv 2410.05993): SigLIP over patches of a square, learned queries, a mixture-of-experts decoder.

Which patches of the square show the picture depends on its shape: preprocessing leaves out the others and feeds patches
in any number, their positions and a mask. The side of the square, 490 or 980 pixels, decides how many queries read
them; it is the checkpoint's, fixed when the graph is built. Weights in the layout that transformers writes, in the one
of its modules, or in that of https://github.com/rhymes-ai/Aria.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphs.architectures.idefics2 import patch_weight
from graphs.components.connectors.queries import QueryProjector
from graphs.components.image_text import MAX_CONTEXT, ImageTextDecoder
from graphs.components.text.config import TextConfig
from graphs.components.vision.clip import ClipVisionConfig, selected
from graphs.components.vision.navit import (
    IDEFICS3_BASE,
    NavitTower,
    PatchEmbeddings,
    key_mask,
    read_navit,
    siglip_so400m,
)
from graphs.config import ConfigReader
from graphs.preprocess.aria import AriaProcessor
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Dim, TensorSpec, Variant
from graphs.weights import Permute, Reshape, Rows, Source, Transpose, by_prefix

#: `model_type` of a vision_config -> the tower's defaults
TOWERS = dict.fromkeys(("idefics3_vision", "aria_vision_model"), IDEFICS3_BASE)

#: the defaults of an AriaTextConfig
ARIA_TEXT = TextConfig(
    4096, 4096, 32, 32, 0, 32000, mlp="experts", moe_num_experts=8, moe_topk=2, moe_num_shared_experts=2
)
DECODERS = dict.fromkeys(("aria_text", "aria_moe_lm"), ARIA_TEXT)

ARIA_25B = replace(
    ARIA_TEXT,
    hidden_size=2560,
    intermediate_size=1664,
    num_hidden_layers=28,
    num_attention_heads=20,
    num_key_value_heads=20,
    vocab_size=100352,
    max_position_embeddings=65536,
    rope_theta=5e6,
    moe_num_experts=64,
    moe_topk=6,
)

#: patches of a square -> the queries that read it
QUERIES = ((1225, 128), (4900, 256))

CHATML = PromptTemplate(
    user="<|im_start|>user\n", assistant="<|im_end|>\n<|im_start|>assistant\n", image="<|img|>", image_separator=""
)

#: our names of the projections inside PyTorch's multi-head attention, in the order of its fused weight
FUSED = ("q_in", "k_in", "v_in")


class QueriedEncoder(nn.Module):
    """Patches [P, N, 3, K, K] uint8, their positions and which are real [P, N] int64, to embeddings [1, P * Q, D]."""

    def __init__(self, tower: NavitTower, projector: QueryProjector) -> None:
        super().__init__()
        self.tower, self.projector, self.width = tower, projector, projector.feed_forward.linear_out.out_features

    def forward(self, pixel_values: Tensor, patch_position: Tensor, patch_mask: Tensor) -> Tensor:
        mask_P11N = key_mask(patch_mask, self.projector.query.dtype)
        x_PND = self.tower(pixel_values, patch_position, mask=mask_P11N)
        return self.projector(x_PND, mask_P11N).reshape(1, -1, self.width)


@dataclass(frozen=True)
class Aria(ImageTextDecoder):
    """Configuration of one Aria. `select_layer`: the tower's state that is read, counted as LLaVA does."""

    name = "aria"
    aliases = (
        (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
        (r"(model\.)?multi_modal_projector\.ln_ffn\.", "multi_modal_projector.layer_norm."),
        (r"(model\.)?multi_modal_projector\.ffn\.", "multi_modal_projector.feed_forward."),
        (r"model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"model\.language_model(\.layers\.\d+\.mlp\.experts)\.gate_up_proj", r"language_model.model\1.fc1.weight"),
        (r"model\.language_model(\.layers\.\d+\.mlp\.experts)\.down_proj", r"language_model.model\1.fc2.weight"),
        (r"model\.language_model\.", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
    )
    unused = (
        r"vision_tower\.encoder\.layers\..*",  # layers above the selected one
        r"vision_tower\.post_layernorm\..*",
        r"language_model\.lm_head\.weight",  # a tied head saved all the same
        r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    )

    vision: ClipVisionConfig
    text: TextConfig
    queries: tuple[tuple[int, int], ...] = QUERIES
    select_layer: int = -1
    processor: AriaProcessor | None = None  # None: the tower's own square, not split
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        vision = replace(IDEFICS3_BASE, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        vision = replace(vision, num_attention_heads=4, image_size=48, patch_size=8)
        text = replace(ARIA_TEXT, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
        text = replace(text, num_key_value_heads=2, vocab_size=256, max_position_embeddings=96, moe_num_experts=6)
        return (
            Variant("tiny", cls(vision, text, ((36, 5),), processor=AriaProcessor(8, 6, 5, 48, 16))),
            Variant("aria-25b", cls(siglip_so400m(980), ARIA_25B), "rhymes-ai/Aria", 25_300_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        vision = read_navit(reader.section("vision_config"), TOWERS, "idefics3_vision")
        queries = read_queries(reader)
        layers = vision.num_hidden_layers
        return cls(
            vision=vision,
            text=read_experts(reader),
            queries=tuple(queries.items()),
            select_layer=reader.int("vision_feature_layer", -1, low=-layers - 1, high=layers),
            processor=AriaProcessor.from_config(preprocessor, vision.patch_size, vision.grid, queries),
        )

    @property
    def image_processor(self) -> AriaProcessor:
        vision, queries = self.vision, dict(self.queries)
        return self.processor or AriaProcessor.from_config(None, vision.patch_size, vision.grid, queries)

    @property
    def image_size(self) -> int:
        """Side of the square that pictures stand in."""
        return self.image_processor.size

    @property
    def visual_tokens(self) -> int:
        """The most image embeddings that one picture becomes."""
        return self.image_processor.pictures[1] * self.image_processor.tokens

    def encoder(self) -> nn.Module:
        embeddings = PatchEmbeddings(self.vision, self.image_processor)
        (layers,) = selected(self.vision, self.select_layer)
        return QueriedEncoder(
            NavitTower(self.vision, embeddings, layers, post_norm=False),
            QueryProjector(self.vision, self.image_processor.tokens, self.text.hidden_size),
        )

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        side, processor = self.vision.patch_size, self.image_processor
        shape = (sized("pictures", *processor.pictures), sized("patches", *processor.patches))
        return (
            TensorSpec("pixel_values", (*shape, 3, side, side), torch.uint8, "pixels"),
            TensorSpec("patch_position", shape, torch.int64, "ids", self.vision.grid**2),
            TensorSpec("patch_mask", shape, torch.int64, "ids", 2),
        )

    def image_embeds(self) -> TensorSpec:
        fewest, most = (count * self.image_processor.tokens for count in self.image_processor.pictures)
        return TensorSpec("image_embeds", (1, sized("visual_tokens", fewest, most), self.text.hidden_size))

    def source(self, parameter: str) -> Source:
        prefix, _, name = parameter.rpartition("mlp.routed.")
        if prefix:
            layer = f"language_model.model.{prefix.removeprefix('text_decoder.')}mlp."
            return self.experts(layer, name)
        if parameter == "vision_encoder.tower.embeddings.patch_embedding.weight":
            return patch_weight("vision_tower.embeddings.patch_embedding.weight", self.vision)
        if parameter == "vision_encoder.projector.query":
            return Source("multi_modal_projector.query", (Rows(0, self.image_processor.tokens),))
        *_, module, kind = parameter.split(".")
        if parameter.startswith("vision_encoder.projector.cross_attn.") and module in FUSED:
            part, width = FUSED.index(module), self.vision.hidden_size
            fused = f"multi_modal_projector.cross_attn.multihead_attn.in_proj_{kind}"
            return Source(fused, (Rows(part * width, (part + 1) * width),))
        head = "model.embed_tokens." if self.text.tie_word_embeddings else "lm_head."
        return by_prefix(
            parameter,
            {
                "vision_encoder.tower.layers.": "vision_tower.encoder.layers.",
                "vision_encoder.tower.": "vision_tower.",
                "vision_encoder.projector.cross_attn.out_proj.": (
                    "multi_modal_projector.cross_attn.multihead_attn.out_proj."
                ),
                "vision_encoder.projector.": "multi_modal_projector.",
                "token_embedding.": "language_model.model.embed_tokens.",
                "text_decoder.lm_head.": f"language_model.{head}",
                "text_decoder.": "language_model.model.",
            },
        )

    def experts(self, layer: str, name: str) -> Source:
        """Where the checkpoint keeps the experts of a layer: grouped, [E, in, out], gates and values side by side."""
        text = self.text
        inner, width = text.intermediate_size, text.moe_num_experts * text.intermediate_size
        turned = (Permute((0, 2, 1)), Reshape((width, text.hidden_size)))
        return {
            "router.weight": Source(f"{layer}router.weight"),
            "gate_proj.weight": Source(f"{layer}experts.fc1.weight", (Rows(0, inner, 2), *turned)),
            "up_proj.weight": Source(f"{layer}experts.fc1.weight", (Rows(inner, 2 * inner, 2), *turned)),
            "down_proj.weight": Source(f"{layer}experts.fc2.weight", (Reshape((width, text.hidden_size)), Transpose())),
        }[name]

    def unused_parameters(self) -> int:
        """The tower's layers above the selected one, its last norm, and queries of a larger square."""
        vision = self.vision
        above = vision.num_hidden_layers - selected(vision, self.select_layer)[0]
        queries = max(count for _, count in self.queries) - self.image_processor.tokens
        return above * vision.layer_parameters + (2 + queries) * vision.hidden_size

    @property
    def template(self) -> PromptTemplate:
        return CHATML


def sized(name: str, fewest: int, most: int) -> int | Dim:
    """A dimension that is dynamic where it can be."""
    return Dim(name, fewest, most) if fewest < most else most


def read_queries(config: ConfigReader) -> dict[int, int]:
    """`projector_patch_to_query_dict`: queries by the patches of a square. Raises: UserError."""
    section = config.section("projector_patch_to_query_dict")
    if not section.values:
        return dict(QUERIES)
    if not all(str(key).isdecimal() for key in section.values):
        raise section.error(f"{sorted(section.values)} must be numbers of patches")
    return {int(key): section.int(key, high=4096) for key in section.values}


def read_experts(reader: ConfigReader) -> TextConfig:
    """The decoder of an Aria; embeddings are tied where the whole model says so. Raises: UserError."""
    section = reader.section("text_config")
    family = DECODERS[section.choice("model_type", DECODERS, default="aria_text")]
    changes: dict[str, Any] = {"tie_word_embeddings": reader.bool("tie_word_embeddings", False)}
    if "moe_intermediate_size" in section:  # of the authors' files, in which the other key means something else
        changes["intermediate_size"] = section.int("moe_intermediate_size")
    text = TextConfig.from_reader(ConfigReader({**section.values, **changes}, section.where), family)
    experts = section.int("moe_num_experts", family.moe_num_experts, high=4096)
    return replace(
        text,
        moe_num_experts=experts,
        moe_topk=section.int("moe_topk", min(family.moe_topk, experts), high=experts),
        moe_num_shared_experts=section.int("moe_num_shared_experts", family.moe_num_shared_experts, high=1024),
    )


ARCHITECTURE = Aria
