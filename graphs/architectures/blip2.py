"""BLIP-2 (Li et al., arXiv 2301.12597): a picture's states through a Q-Former to a few tokens of a language model.

The language model is OPT or of another decoder family, or T5, which encodes the picture's tokens and the prompt; then
the decoder's keys and values of them are made once, by `text_encoder`. Weights in the layout of transformers'
Blip2ForConditionalGeneration, which is that of the hub. The Q-Former here is the second stage's, without text: the
masks of the first stage (contrast, matching, generation) train it and are no part of the deployed graph.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import nn

from graphs.components.connectors.qformer import QFormer, QFormerConfig, qformer_source
from graphs.components.image_text import MAX_CONTEXT, ImageTextDecoder, VisionEncoder
from graphs.components.text import opt, t5
from graphs.components.text.bert import BertConfig
from graphs.components.text.config import FAMILIES, TextConfig
from graphs.components.text.opt import OptDecoder, read_opt
from graphs.components.text.t5 import T5Decoder, T5Encoder, T5Options, read_t5
from graphs.components.vision.blip import EVA_GIANT, BlipVisionTower, read_blip_tower, tower_source
from graphs.components.vision.clip import ClipVisionConfig
from graphs.config import ConfigReader
from graphs.preprocess.image import ImageProcessor, read_processor
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Dim, Method, TensorSpec, Variant
from graphs.weights import Source, by_prefix

OPT_2_7B = TextConfig(
    2560,
    10240,
    32,
    32,
    32,
    50304,
    rms_norm_eps=1e-5,
    hidden_act="relu",
    tie_word_embeddings=True,
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    norm="layer",
    mlp="plain",
)
OPT_6_7B = replace(OPT_2_7B, hidden_size=4096, intermediate_size=16384)
FLAN_T5_XL = TextConfig(2048, 5120, 24, 32, 32, 32128, t5.NO_END, head_dim=64, hidden_act="gelu_pytorch_tanh")
FLAN_T5_XXL = replace(
    FLAN_T5_XL, hidden_size=4096, intermediate_size=10240, num_attention_heads=64, num_key_value_heads=64
)
TINY_TOWER = replace(
    EVA_GIANT,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
TINY_QFORMER = QFormerConfig(BertConfig(48, 96, 3, 4, 256, 64), queries=8)
TINY_OPT = replace(
    OPT_2_7B,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=256,
    max_position_embeddings=96,
)
TINY_T5 = TextConfig(64, 96, 2, 4, 4, 256, 96, head_dim=12, hidden_act="gelu_pytorch_tanh")


def llama_name(parameter: str, text: TextConfig) -> str:
    """What checkpoints of LLaMA's descent call a parameter, given by its name in the root module."""
    head = "model.embed_tokens." if text.tie_word_embeddings else "lm_head."
    ours = {"token_embedding.": "model.embed_tokens.", "text_decoder.lm_head.": head, "text_decoder.": "model."}
    return by_prefix(parameter, ours).keys[0]


#: `model_type` of a text_config -> how its checkpoints call a parameter
NAMES: Mapping[str, Callable[[str, TextConfig], str]] = {
    "opt": opt.public_name,
    "t5": t5.public_name,
    "llama": llama_name,
    "mistral": llama_name,
    "qwen2": llama_name,
}


def read_language(config: ConfigReader) -> dict[str, Any]:
    """`text`, `family` and `t5` of a Blip2, from a `text_config`; transformers' default is OPT. Raises: UserError."""
    family = config.choice("model_type", NAMES, default="opt")
    if family == "t5":
        text, options = read_t5(config)
        return {"text": text, "family": family, "t5": options}
    text = read_opt(config) if family == "opt" else TextConfig.from_reader(config, FAMILIES[family])
    return {"text": text, "family": family}


@dataclass(frozen=True)
class Blip2(ImageTextDecoder):
    """Configuration of one BLIP-2. `family`: the language model's `model_type`; `t5`: what a T5 has besides `text`."""

    name = "blip2"
    unused: ClassVar[tuple[str, ...]] = (
        r"(vision_model|qformer)\.embeddings\.position_ids",
        r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\..*",  # the first stage's, of text
        r"language_model\.(en|de)coder\.embed_tokens\.weight",  # saved all the same beside what they share
        r"language_model\.decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    )

    vision: ClipVisionConfig
    qformer: QFormerConfig
    text: TextConfig
    family: str = "opt"
    t5: T5Options | None = None
    processor: ImageProcessor | None = None  # None: stretched to the tower's size
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        xl, xxl = T5Options(24), T5Options(24)
        hub, qformer = "Salesforce/blip2", QFormerConfig()
        return (
            Variant("tiny", cls(TINY_TOWER, TINY_QFORMER, TINY_OPT)),
            Variant("tiny-t5", cls(TINY_TOWER, TINY_QFORMER, TINY_T5, "t5", T5Options(2))),
            Variant("blip2-opt-2.7b", cls(EVA_GIANT, qformer, OPT_2_7B), f"{hub}-opt-2.7b", 3_740_000_000),
            Variant("blip2-opt-6.7b", cls(EVA_GIANT, qformer, OPT_6_7B), f"{hub}-opt-6.7b", 7_750_000_000),
            Variant(
                "blip2-flan-t5-xl",
                cls(EVA_GIANT, qformer, FLAN_T5_XL, "t5", xl),
                f"{hub}-flan-t5-xl",
                3_940_000_000,
            ),
            Variant(
                "blip2-flan-t5-xxl",
                cls(EVA_GIANT, qformer, FLAN_T5_XXL, "t5", xxl),
                f"{hub}-flan-t5-xxl",
                12_200_000_000,
            ),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        vision = read_blip_tower(reader.section("vision_config"), EVA_GIANT)
        return cls(
            vision=vision,
            qformer=QFormerConfig.from_reader(reader, cls.reads_text()),
            processor=read_processor(preprocessor, vision.image_size),
            **read_language(reader.section("text_config")),
        )

    @classmethod
    def reads_text(cls) -> bool:
        """Whether the Q-Former reads an instruction."""
        return False

    def given(self, tensors: Container[str]) -> Self:
        """A head of its own counts, whatever config.json says of ties: transformers reads such checkpoints so."""
        untied = "language_model.lm_head.weight" in tensors
        return replace(self, text=replace(self.text, tie_word_embeddings=False)) if untied else self

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def visual_tokens(self) -> int:
        return self.qformer.queries

    def encoder(self) -> nn.Module:
        qformer = QFormer(self.qformer, self.vision.hidden_size, self.text.hidden_size)
        return VisionEncoder(self.image_processor, BlipVisionTower(self.vision), qformer)

    def decoder(self) -> nn.Module:
        if self.t5 is not None:
            return T5Decoder(self.text, self.t5, self.context)
        return OptDecoder(self.text, self.context) if self.family == "opt" else super().decoder()

    def build(self) -> nn.Module:
        root = super().build()
        if self.t5 is not None:
            root.text_encoder = T5Encoder(self.text, self.t5, self.context)
        return root

    def methods(self, root: nn.Module) -> tuple[Method, ...]:
        """Those of a decoder; a T5's encoder stands before its decoder and gives it keys and values of the prompt."""
        vision, embedding, decoder = super().methods(root)
        if self.t5 is None:
            return vision, embedding, decoder
        text, length = self.text, Dim("prompt", 1, self.context)
        crossed = (text.num_hidden_layers, text.num_attention_heads, length, text.head_width)
        seen = tuple(TensorSpec(name, crossed) for name in ("cross_keys", "cross_values"))
        prompt = TensorSpec("inputs_embeds", (1, length, text.hidden_size))
        encoder = Method("text_encoder", root.get_submodule("text_encoder"), (prompt,), seen)
        return vision, embedding, encoder, replace(decoder, inputs=(*decoder.inputs, *seen))

    def source(self, parameter: str) -> Source:
        tower, qformer = "vision_encoder.tower.", "vision_encoder.projector."
        if parameter.startswith(tower):
            return tower_source(parameter.removeprefix(tower), self.vision)
        if parameter.startswith(qformer):
            return qformer_source(parameter.removeprefix(qformer), self.qformer)
        return Source(f"language_model.{NAMES[self.family](parameter, self.text)}")

    @property
    def image_processor(self) -> ImageProcessor:
        side = self.vision.image_size
        return self.processor or ImageProcessor(None, side, side, crop_size=None)

    @property
    def template(self) -> PromptTemplate:
        """Pictures stand before the token that begins a text; what follows is the user's own words."""
        if self.t5 is None:
            return PromptTemplate(image_separator="", images_first=True)
        return PromptTemplate(image_separator="", images_first=True, assistant="</s>", start=(self.t5.start,))


ARCHITECTURE = Blip2
