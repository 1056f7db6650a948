"""MANTIS (Jiang et al., arXiv 2405.01483): LLaVA, Idefics 2 and Fuyu taught to read several pictures in one prompt.

Three graphs, none of them new: which one a checkpoint has, its config.json says. Mantis' own are the weights, and how
the prompt counts pictures (https://github.com/TIGER-AI-Lab/Mantis).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from graphs.architectures.fuyu_8b import PLAIN, Fuyu
from graphs.architectures.idefics2 import Idefics2
from graphs.architectures.llava_1_5 import Llava
from graphs.components.text.config import FAMILIES, TextConfig
from graphs.components.vision.clip import CLIP_LARGE_336
from graphs.components.vision.navit import siglip_so400m
from graphs.config import ConfigReader
from graphs.preprocess.padded_raster import PaddedRasterProcessor
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Architecture, Variant

#: a few pictures of 728 embeddings, and a conversation
MAX_CONTEXT = 4096

LLAMA3 = PromptTemplate(
    system="<|start_header_id|>system<|end_header_id|>\n\n"
    "You are a pirate chatbot who always responds in pirate speak!<|eot_id|>",  # so the authors trained and ask it
    user="<|start_header_id|>user<|end_header_id|>\n\n",
    assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    image_separator="",
    label="(image {number}: <Image>{image}</Image>)",
)

SPOKEN = replace(
    PLAIN,
    system=(
        "<s>You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language.\n"
    ),
    user="USER: ",
    user_text="",
    assistant="<0x04>ASSISTANT:",
    images_first=False,
    label="image {index}: {image}",
)


@dataclass(frozen=True)
class MantisLlava(Llava):
    """Configuration of one that is a LLaVA: SigLIP or CLIP, two-layer MLP, Llama 3."""

    name = "mantis"

    max_context: int = MAX_CONTEXT

    @property
    def template(self) -> PromptTemplate:
        return LLAMA3


@dataclass(frozen=True)
class MantisIdefics2(Idefics2):
    """Configuration of one that is an Idefics 2, in whose words it speaks."""

    name = "mantis"

    max_context: int = MAX_CONTEXT


@dataclass(frozen=True)
class MantisFuyu(Fuyu):
    """Configuration of one that is a Fuyu; tokens stand around its pictures, and a text begins behind each."""

    name = "mantis"

    @property
    def image_processor(self) -> PaddedRasterProcessor:
        return replace(super().image_processor, before="|IMAGE|", end="|ENDOFIMAGE|<s>")

    @property
    def template(self) -> PromptTemplate:
        return SPOKEN


#: `model_type` of a config.json -> what the checkpoint is
SYSTEMS: Mapping[str, type[Architecture]] = {
    "llava": MantisLlava,
    "mllava": MantisLlava,
    "idefics2": MantisIdefics2,
    "fuyu": MantisFuyu,
}


@dataclass(frozen=True)
class Mantis(Architecture):
    """All of them: what a checkpoint is read as, is one of `SYSTEMS`."""

    name = "mantis"
    kind = "vlm_decoder"

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        llama3 = TextConfig(4096, 14336, 32, 32, 8, 128258, 8192, rms_norm_eps=1e-5, rope_theta=500000.0)
        llava, idefics2, fuyu = (
            next(variant.architecture for variant in system.variants() if variant.name == "tiny")
            for system in (Llava, Idefics2, Fuyu)
        )
        assert isinstance(llava, Llava)
        assert isinstance(idefics2, Idefics2)
        assert isinstance(fuyu, Fuyu)
        big = next(variant.architecture for variant in Idefics2.variants() if variant.name == "idefics2-8b")
        assert isinstance(big, Idefics2)
        hub = "TIGER-Lab/Mantis-8B"
        return (
            Variant("tiny", MantisLlava(llava.vision, llava.text)),
            Variant(
                "tiny-idefics2",
                MantisIdefics2(idefics2.vision, idefics2.text, idefics2.perceiver, idefics2.processor),
            ),
            Variant("tiny-fuyu", MantisFuyu(fuyu.text, fuyu.patch_size, fuyu.processor)),
            Variant(
                "mantis-8b-siglip-llama3",
                MantisLlava(siglip_so400m(384), llama3),
                f"{hub}-siglip-llama3",
                8_480_000_000,
            ),
            Variant("mantis-8b-clip-llama3", MantisLlava(CLIP_LARGE_336, llama3), f"{hub}-clip-llama3", 8_350_000_000),
            Variant(
                "mantis-8b-idefics2",
                MantisIdefics2(big.vision, big.text, big.perceiver),
                f"{hub}-Idefics2",
                8_400_000_000,
            ),
            Variant("mantis-8b-fuyu", MantisFuyu(FAMILIES["persimmon"]), f"{hub}-Fuyu", 9_400_000_000),
        )

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
    ) -> Architecture:
        kind = ConfigReader(config).choice("model_type", SYSTEMS)
        return SYSTEMS[kind].from_config(config, preprocessor)


ARCHITECTURE = Mantis
