"""OtterHD (Li et al., arXiv 2311.04219): Fuyu-8B, instruction-tuned on pictures of many sizes; the same graph.

Its paper changes the weights alone, and its hub files name FuyuForCausalLM; a conversation says who speaks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphs.architectures.fuyu_8b import PLAIN, Fuyu
from graphs.components.text.config import FAMILIES
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Variant

DIALOGUE = replace(PLAIN, user="", question="User: ", assistant=f" Assistant:{PLAIN.assistant}")


@dataclass(frozen=True)
class OtterHD(Fuyu):
    """Configuration of one OtterHD."""

    name = "otterhd"

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        return cls.tiny(), Variant("otterhd-8b", cls(FAMILIES["persimmon"]), "Otter-AI/OtterHD-8B", 9_400_000_000)

    @property
    def template(self) -> PromptTemplate:
        return DIALOGUE


ARCHITECTURE = OtterHD
