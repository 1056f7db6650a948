"""Janus-Pro (Chen et al., arXiv 2501.17811): Janus trained longer, in two sizes, and spoken to by other names."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphs.architectures.janus import Janus
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Variant


@dataclass(frozen=True)
class JanusPro(Janus):
    """Configuration of one Janus-Pro."""

    name = "janus_pro"

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        return (
            cls.tiny(),
            Variant("janus-pro-1b", cls.published(2048, 5632, 24, 16), "deepseek-ai/Janus-Pro-1B", 2_090_000_000),
            Variant("janus-pro-7b", cls.published(4096, 11008, 30, 32), "deepseek-ai/Janus-Pro-7B", 7_420_000_000),
        )

    @property
    def template(self) -> PromptTemplate:
        return replace(super().template, user="<|User|>: ", assistant="\n\n<|Assistant|>:")


ARCHITECTURE = JanusPro
