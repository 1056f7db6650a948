"""The texts about a checkpoint that a run of `zoo.evaluate` writes: docs/zoo.md and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Scores(Protocol):
    """Exact match of one task: shares 0..1."""

    @property
    def task(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def exact(self) -> float: ...
    @property
    def text_only(self) -> float: ...
    @property
    def frequent(self) -> float: ...
    @property
    def chance(self) -> float: ...


def table(rows: Sequence[Scores]) -> str:
    """A Markdown table of percentages."""
    head = "| task | questions | exact match | text only | most frequent | chance |\n|---|---:|---:|---:|---:|---:|\n"
    return head + "\n".join(
        f"| {r.task} | {r.count} | {r.exact:.1%} | {r.text_only:.1%} | {r.frequent:.1%} | {r.chance:.2%} |"
        for r in rows
    )


def report(rows: Sequence[Scores], facts: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """docs/zoo.md: the scores, what they are compared with and how both came about."""
    return f"""# Accuracy of zoo/mobilevlm-nano

Exact match of greedy float32 answers to {facts["count"]} held-out questions, each about a picture of its own:

{table(rows)}

- *held out*: pictures of other seeds than in training, and every fifth of scikit-learn's handwritten digits, none of
  which is ever trained on. Words come from the same lexicon as in training.
- *text only*: the most frequent training answer to exactly that question, the best to be had without looking.
- *most frequent*: the task's most frequent training answer. *chance*: a uniform guess among its training answers.

Measured by `python -m zoo.evaluate --count {facts["count"]}` (`make evaluate`) on {facts["date"]}
in {facts["seconds"]} s, seed {facts["seed"]}, torch {facts["torch"]}, Python {facts["python"]}.

{_training(training)}
"""


def _training(training: Mapping[str, Any]) -> str:
    if not training:
        return "The checkpoint does not say how it was trained."
    plan = training["plan"]
    return (
        f"Trained by `python -m zoo.train` (`make zoo`) in {plan['processes']} processes of one CPU thread: "
        f"{training['steps']} steps of {plan['batch']} pictures, {training['pictures']} in all, each seen once, "
        f"in {training['minutes']} minutes; seed {plan['seed']}, torch {training['torch']}; saved and resumed at steps "
        f"{', '.join(map(str, training['resumed_at'])) or 'none'}."
    )


def card(rows: Sequence[Scores], config: Mapping[str, Any]) -> str:
    """The model card."""
    vision = config["vision_config"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return f"""---
pipeline_tag: image-text-to-text
---

# mobilevlm-nano

A MobileVLM (arXiv 2312.16886) of four million parameters with trained weights, in the public checkpoint layout: small
enough for a test, and able enough that compression and quantization show in its answers.

- vision: CLIP ViT of width {vision["hidden_size"]}, {vision["num_hidden_layers"]} layers of which all but the last are
  used, {vision["image_size"]} x {vision["image_size"]} pixels in patches of {vision["patch_size"]}: {patches} patches
- projector: LDP (version 1), {patches} patches to {patches // 4} visual tokens
- language: LLaMA of width {config["hidden_size"]}, {config["num_hidden_layers"]} layers, byte-level BPE of
  {config["vocab_size"]} tokens, context of {config["max_position_embeddings"]}
- prompt: that of MobileVLM; the answer ends with `</s>`

It answers questions about pictures like those in `zoo/examples`: colour, shape, count and place of shapes, handwritten
numbers, short words, captions. It knows nothing else: other pictures and other wordings give nonsense.

Exact match on held-out questions (how it was measured: `docs/zoo.md`):

{table(rows)}

Data: drawn by `zoo/scenes.py`, with the handwritten digits of scikit-learn (UCI "Optical Recognition of Handwritten
Digits", CC BY 4.0). Training: `zoo/train.py`; `training.json` has the plan and the time. The tower's last layer and
final norm, which MobileVLM never runs, are there for completeness and untrained. Reading is spelled letter by letter.
"""
