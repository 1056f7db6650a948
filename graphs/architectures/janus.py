"""Janus (Wu et al., arXiv 2410.13848): a LLaMA-like decoder that reads pictures through SigLIP and draws its own.

Reading: SigLIP tower, MLP, text. Drawing: `text_decoder` gives its last states besides logits; `image_head` makes
logits of codes from them, `image_token_embedding` puts the chosen code back in, and `image_decoder` makes a picture of
all codes. Guidance mixes the logits of two decoders, one of which has read the prompt with its words left out: two
instances of one bundle, as every method takes one sequence.
Weights in the layout of transformers' JanusForConditionalGeneration, or that of https://github.com/deepseek-ai/Janus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphs.architectures.deepseek_vl import SYSTEM, read_text
from graphs.architectures.siglip import HALF
from graphs.components.connectors.deep import DeepMLP
from graphs.components.heads.vq import ImageDecoder, ImageHead, ImageTokenEmbedding, VQConfig
from graphs.components.image_text import MAX_CONTEXT, ImageTextDecoder, VisionEncoder
from graphs.components.text.config import TextConfig
from graphs.components.text.decoder import TextDecoder
from graphs.components.vision.clip import ClipVisionConfig
from graphs.components.vision.siglip import (
    SIGLIP_LARGE_384,
    TIMM_TOWERS,
    UNUSED_HEAD,
    SiglipTower,
    head_parameters,
    timm_aliases,
    tower_source,
)
from graphs.config import ConfigReader
from graphs.preprocess.letterbox import LetterboxProcessor, read_letterbox
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Dim, Method, TensorSpec, Variant
from graphs.weights import Source, by_prefix

MARK, BEGIN, END = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"


class DrawingDecoder(TextDecoder):
    """A text decoder that gives logits [1, S, V] and the last states [1, S, D] they were made from."""

    def forward(  # type: ignore[override]  # a method of two outputs, as its signature says
        self, inputs_embeds: Tensor, cache_position: Tensor, rope_position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        states_1SD = self.states(inputs_embeds, cache_position, rope_position)
        return self.lm_head(states_1SD), states_1SD


@dataclass(frozen=True)
class Janus(ImageTextDecoder):
    """Configuration of one Janus. `depth`: of the projector. `original`: weights in the authors' layout."""

    name = "janus"
    kind = "any_to_any"
    aliases = (
        (r"(?:model\.)?vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection_layer\.",
         r"vision_model.encoder.layers.\1.self_attn.out_proj."),
        (r"model\.", ""),
        (r"language_model\.model\.", "language_model."),
        (r"language_model\.lm_head\.", "lm_head."),
        *timm_aliases(r"vision_model\.vision_tower\."),
        (r"gen_vision_model\.decoder\.conv_blocks\.(\d+)\.res\.", r"vqmodel.decoder.up.\1.block."),
        (r"gen_vision_model\.decoder\.conv_blocks\.", "vqmodel.decoder.up."),
        (r"gen_vision_model\.decoder\.mid\.0\.", "vqmodel.decoder.mid.block_1."),
        (r"gen_vision_model\.decoder\.mid\.1\.", "vqmodel.decoder.mid.attn_1."),
        (r"gen_vision_model\.decoder\.mid\.2\.", "vqmodel.decoder.mid.block_2."),
        (r"gen_vision_model\.", "vqmodel."),
        (r"gen_embed\.", "generation_embeddings."),
        (r"gen_aligner\.", "generation_aligner."),
        (r"gen_head\.output_mlp_projector\.", "generation_head.proj_out."),
        (r"gen_head\.", "generation_head."),
    )  # fmt: skip
    unused = (
        *UNUSED_HEAD,
        r"vqmodel\.(encoder\..*|quant_conv\..*|quantize\.codebook_used)",
        r"language_model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    )

    vision: ClipVisionConfig
    text: TextConfig
    drawing: VQConfig
    depth: int = 2
    processor: LetterboxProcessor | None = None  # None: means and deviations a half, as published
    original: bool = False
    max_context: int = MAX_CONTEXT

    @classmethod
    def tiny(cls) -> Variant:
        """The size for tests."""
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        vision = replace(SIGLIP_LARGE_384, image_size=32, patch_size=8, **sizes)
        text = TextConfig(64, 128, 2, 4, 2, 256, max_position_embeddings=96)
        drawing = VQConfig(4, 64, num_embeddings=64, latent_channels=8, base_channels=32, channel_multiplier=(1, 2),
                           num_res_blocks=1)  # fmt: skip
        return Variant("tiny", cls(vision, text, drawing))

    @classmethod
    def published(cls, width: int, inner: int, layers: int, heads: int) -> Self:
        """A published size; all have one tower and one square of codes."""
        text = TextConfig(width, inner, layers, heads, heads, 102400, 16384)
        return cls(SIGLIP_LARGE_384, text, VQConfig(SIGLIP_LARGE_384.grid, width), original=True)

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        whole = cls.published(2048, 5632, 24, 16)
        return cls.tiny(), Variant("janus-1.3b", whole, "deepseek-ai/Janus-1.3B", 2_090_000_000)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        read = cls.from_original if "language_config" in reader else cls.from_hub
        return read(reader, preprocessor)

    @classmethod
    def from_hub(cls, reader: ConfigReader, preprocessor: Mapping[str, Any] | None) -> Self:
        """From the keys of transformers' JanusConfig."""
        vision, depth = read_vision(reader.section("vision_config"))
        text = read_text(reader)
        width = reader.section("vision_config").int("projection_dim", 2048)
        if width != text.hidden_size:
            raise reader.error(f"projection_dim is {width}; the decoder's embeddings are {text.hidden_size} wide")
        drawing = VQConfig.from_reader(reader.section("vq_config"), vision.grid, width)
        return cls(vision, text, drawing, depth, cls.read_processor(preprocessor, vision))

    @classmethod
    def from_original(cls, reader: ConfigReader, preprocessor: Mapping[str, Any] | None) -> Self:
        """From the keys of the authors' repository, which names the tower instead of describing it."""
        names = ("vision", "aligner", "gen_vision", "gen_aligner", "gen_head")
        tower, aligner, codes, gen_aligner, head = (reader.section(f"{n}_config").section("params") for n in names)
        text = read_text(reader, "language_config")
        vision = TIMM_TOWERS[tower.choice("model_name", TIMM_TOWERS)]
        vision = replace(vision, image_size=tower.int("image_size", vision.image_size, high=8192))
        for section in (aligner, gen_aligner):
            section.choice("projector_type", ("mlp_gelu",), default="mlp_gelu")
            if section.int("n_embed", text.hidden_size) != text.hidden_size:
                raise section.error(f"n_embed is not the width of the decoder's embeddings, {text.hidden_size}")
        values = {
            "embed_dim": codes.int("n_embed", 8),
            "num_embeddings": codes.int("image_token_size", 16384),
            "num_hidden_layers": gen_aligner.int("depth", 2, high=64),
            "projection_dim": text.hidden_size,
            "image_token_embed_dim": head.int("image_token_embed", text.hidden_size),
        }
        drawing = VQConfig.from_reader(ConfigReader(values, codes.where), vision.grid, text.hidden_size)
        processor = cls.read_processor(preprocessor, vision)
        return cls(vision, text, drawing, aligner.int("depth", 2, high=64), processor, original=True)

    @classmethod
    def read_processor(cls, preprocessor: Mapping[str, Any] | None, vision: ClipVisionConfig) -> LetterboxProcessor:
        """The checkpoint's own, or the published one; the prompt reads its pictures between marks."""
        default = {"image_mean": [*HALF], "image_std": [*HALF]} if not preprocessor else {}
        fields = read_letterbox({**default, **(preprocessor or {})}, vision.image_size)
        return LetterboxProcessor(**fields, begin=BEGIN, mark=MARK, end=END, tokens=vision.tokens)

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def visual_tokens(self) -> int:
        return self.vision.tokens

    def facts(self) -> dict[str, Any]:
        drawing = {"codes": self.drawing.codes, "image_size": self.drawing.image_size, "begin": BEGIN}
        return {**super().facts(), "drawing": drawing}

    def encoder(self) -> nn.Module:
        projector = DeepMLP(self.vision.hidden_size, self.text.hidden_size, self.depth, self.vision.hidden_act)
        return VisionEncoder(self.image_processor, SiglipTower(self.vision), projector)

    def decoder(self) -> nn.Module:
        return DrawingDecoder(self.text, self.context)

    def build(self) -> nn.Module:
        root, pixels = super().build(), self.image_processor
        root.image_token_embedding = ImageTokenEmbedding(self.drawing)
        root.image_head = ImageHead(self.drawing)
        root.image_decoder = ImageDecoder(self.drawing, pixels.image_mean, pixels.image_std, pixels.rescale_factor)
        return root

    def methods(self, root: nn.Module) -> tuple[Method, ...]:
        *others, decoder = super().methods(root)
        width, drawing = self.text.hidden_size, self.drawing
        codes, side = drawing.codes, drawing.image_size
        states = TensorSpec("hidden_states", (*decoder.outputs[0].shape[:2], width))
        some = Dim("codes", 1, codes)
        ids = TensorSpec("image_ids", (1, some), torch.int64, "ids", drawing.num_embeddings)
        return (
            *others,
            replace(decoder, outputs=(*decoder.outputs, states)),
            Method(
                "image_token_embedding",
                root.get_submodule("image_token_embedding"),
                (ids,),
                (TensorSpec("inputs_embeds", (1, some, width)),),
            ),
            Method(
                "image_head",
                root.get_submodule("image_head"),
                (replace(states, shape=(1, 1, width)),),
                (TensorSpec("image_logits", (1, 1, drawing.num_embeddings)),),
            ),
            Method(
                "image_decoder",
                root.get_submodule("image_decoder"),
                (replace(ids, shape=(1, codes)),),
                (TensorSpec("pixels", (1, 3, side, side)),),
            ),
        )

    def source(self, parameter: str) -> Source:
        tower = "vision_encoder.tower."
        if parameter.startswith(tower):
            return tower_source(parameter.removeprefix(tower), self.vision, self.original)
        head = "language_model.embed_tokens." if self.text.tie_word_embeddings else "lm_head."
        decoder = "image_decoder."
        return by_prefix(
            parameter,
            {
                **self.layers("vision_encoder.projector.layers.", "aligner.", self.depth),
                **self.layers(
                    "image_token_embedding.aligner.layers.", "generation_aligner.", self.drawing.aligner_depth
                ),
                "image_token_embedding.codes.": "generation_embeddings.",
                "image_head.": "generation_head.",
                f"{decoder}codebook.": "vqmodel.quantize.embedding.",
                f"{decoder}post_quant_conv.": "vqmodel.post_quant_conv.",
                **{
                    f"{decoder}mid.{n}.": f"vqmodel.decoder.mid.{p}."
                    for n, p in enumerate(("block_1", "attn_1", "block_2"))
                },
                **{
                    f"{decoder}up.{n}.conv.": f"vqmodel.decoder.up.{n}.upsample.conv."
                    for n in range(len(self.drawing.channels))
                },
                decoder: "vqmodel.decoder.",
                "token_embedding.": "language_model.embed_tokens.",
                "text_decoder.lm_head.": head,
                "text_decoder.": "language_model.",
            },
        )

    def layers(self, ours: str, theirs: str, depth: int) -> dict[str, str]:
        """Where the linear layers of a projector are: numbered with their activations between them by the authors."""
        names = ["fc1", *(f"hidden_layers.{index}" for index in range(depth - 1))]
        if self.original:
            names = [f"layers.{2 * index}" for index in range(depth)]
        return {f"{ours}{index}.": f"{theirs}{name}." for index, name in enumerate(names)}

    def unused_parameters(self) -> int:
        """The encoder of codes, and in the authors' layout the pooling head of SigLIP."""
        return self.drawing.encoder_parameters + (head_parameters(self.vision) if self.original else 0)

    @property
    def image_processor(self) -> LetterboxProcessor:
        return self.processor or self.read_processor(None, self.vision)

    @property
    def template(self) -> PromptTemplate:
        return PromptTemplate(SYSTEM, "User: ", "\n\nAssistant:", image=MARK)


def read_vision(config: ConfigReader) -> tuple[ClipVisionConfig, int]:
    """The tower of a JanusVisionConfig, and the depth of the projector behind it. Raises: UserError."""
    config.choice("model_type", ("janus_vision_model",), default="janus_vision_model")
    for key, usual in (("use_qk_norm", False), ("attention_bias", True)):
        if config.bool(key, usual) is not usual:
            raise config.error(f"{key} is {not usual}".lower() + "; no published tower of this system is so")
    width = config.int("hidden_size", SIGLIP_LARGE_384.hidden_size)
    inner = int(width * config.float("mlp_ratio", 4.0, low=0.0, high=64.0))
    values = {**config.values, "intermediate_size": inner}
    tower = ClipVisionConfig.from_reader(ConfigReader(values, config.where), SIGLIP_LARGE_384)
    return tower, config.int("depth", 2, high=64)


ARCHITECTURE = Janus
