"""LLaVA-CoT (Xu et al., arXiv 2411.10440): Llama 3.2 Vision taught to answer in stages.

The training alone differs: its checkpoint has the keys, the configuration and the class of
Llama-3.2-11B-Vision-Instruct, whose graph this is. Answers hold their stages as tags (<SUMMARY>, <CAPTION>,
<REASONING>, <CONCLUSION>); searching among several answers a stage is sampling on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphs.architectures.llama3_2_vision import Mllama
from graphs.spec import Variant


@dataclass(frozen=True)
class LlavaCot(Mllama):
    """Configuration of one LLaVA-CoT."""

    name = "llava_cot"

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        tiny, base, _ = super().variants()
        return tiny, replace(base, name="llava-cot-11b", checkpoint="Xkev/Llama-3.2V-11B-cot")


ARCHITECTURE = LlavaCot
