"""VisualBERT (Li et al., arXiv 1908.03557): words of a text and regions of a picture in one BERT.

Regions are found, and their features computed, outside: `fusion_encoder` takes those, with the words that speak of each
as weights of a mean (`graphs.preprocess.regions`), and gives what the head that a checkpoint's `architectures` names
makes of them. A choice among several texts is one call a text. Weights in the layout of transformers' classes, which is
that of the hub.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from graphs.components.fusion import HEADS, MIN_TEXT, FusionEncoder
from graphs.components.text.bert import BERT_BASE, BertConfig, public_part
from graphs.config import ConfigReader
from graphs.errors import nearest
from graphs.files import shown
from graphs.spec import Architecture, Dim, Method, TensorSpec, Variant
from graphs.weights import Source

#: a class of `architectures` -> a name in `HEADS`
TASKS: Mapping[str, str] = {
    "VisualBertModel": "encode",
    "VisualBertForPreTraining": "pretrain",
    "VisualBertForMultipleChoice": "choose",
    "VisualBertForQuestionAnswering": "answer",
    "VisualBertForVisualReasoning": "reason",
    "VisualBertForRegionToPhraseAlignment": "align",
}

#: the most regions of a picture
MAX_REGIONS = 512


@dataclass(frozen=True)
class VisualBert(Architecture):
    """Configuration of one VisualBERT. `task`: a name in `HEADS`. `features`: width of a region's.

    `types`: kinds of tokens. `labels`: classes of the head. `bypass`: whether regions join only behind the layers.
    `tied`: whether the scores of the vocabulary are made by its words.
    """

    name = "visualbert"
    kind = "fusion_encoder"
    aliases = ((r"(?=(embeddings|encoder|pooler|additional_layer)\.)", "visual_bert."),)
    unused = (
        r"visual_bert\.embeddings\.position_ids",
        r"visual_bert\.pooler\..*",  # where the head reads other states
        r"cls\.predictions\.decoder\.bias",  # the other name of predictions.bias
        r"cls\.(predictions|seq_relationship)\..*",  # saved beside the alignment's head, which uses none of them
        r"attention\.value\..*",
    )

    text: BertConfig
    features: int
    task: str = "pretrain"
    types: int = 2
    labels: int = 2
    bypass: bool = False
    tied: bool = True

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        tiny, hub = BertConfig(64, 128, 2, 4, 256, 64), "uclanlp/visualbert"
        return (
            Variant("tiny", cls(tiny, 48)),
            Variant("tiny-vqa", cls(tiny, 48, "answer", labels=10)),
            Variant("tiny-align", cls(tiny, 48, "align")),
            Variant("visualbert-vqa-coco-pre", cls(BERT_BASE, 2048), f"{hub}-vqa-coco-pre", 112_000_000),
            Variant("visualbert-nlvr2-coco-pre", cls(BERT_BASE, 1024), f"{hub}-nlvr2-coco-pre", 112_000_000),
            Variant("visualbert-vcr-coco-pre", cls(BERT_BASE, 512), f"{hub}-vcr-coco-pre", 112_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        names = config.get("architectures") or ["VisualBertForPreTraining"]
        name = str(names[0]) if isinstance(names, list) else str(names)
        if name not in TASKS:
            raise reader.error(f"architectures names {shown(name, 60)}; {nearest(name, TASKS)}")
        named = config.get("id2label")
        labels = len(named) if isinstance(named, Mapping) and named else reader.int("num_labels", 2, high=1 << 20)
        return cls(
            text=BertConfig.from_reader(reader, BERT_BASE),
            features=reader.int("visual_embedding_dim", 512),
            task=TASKS[name],
            types=reader.int("type_vocab_size", 2, high=1 << 16),
            labels=1 if TASKS[name] == "choose" else labels,
            bypass=reader.bool("bypass_transformer", False),
        )

    def given(self, tensors: Container[str]) -> Self:
        """A head of its own counts, whatever config.json says of ties: transformers reads such checkpoints so."""
        return replace(self, tied="cls.predictions.decoder.weight" not in tensors)

    def facts(self) -> dict[str, Any]:
        return {
            "text_length": self.text.max_position_embeddings,
            "region_features": self.features,
            "layers": self.text.num_hidden_layers,
            "vocab_size": self.text.vocab_size,
            "labels": self.labels,
        }

    def build(self) -> nn.Module:
        root = nn.Module()
        head = HEADS[self.task](self.text, self.labels)
        root.fusion_encoder = FusionEncoder(self.text, self.types, self.features, head, self.bypass)
        return root

    def methods(self, root: nn.Module) -> tuple[Method, ...]:
        text, regions = Dim("text", MIN_TEXT, self.text.max_position_embeddings), Dim("regions", 1, MAX_REGIONS)
        words = self.text.max_position_embeddings

        def ids(name: str, shape: tuple[int | Dim, ...], high: int) -> TensorSpec:
            return TensorSpec(name, shape, torch.int64, "ids", high)

        inputs: tuple[TensorSpec, ...] = (
            ids("input_ids", (1, text), self.text.vocab_size),
            ids("token_type_ids", (1, text), self.types),
            TensorSpec("visual_embeds", (1, regions, self.features)),
            ids("visual_token_type_ids", (1, regions), self.types),
            TensorSpec("word_weights", (1, regions, words)),
        )
        if self.task == "align":
            inputs += (ids("region_to_phrase_position", (1, Dim("phrases", 1, words)), 1 + MIN_TEXT),)
        return (Method("fusion_encoder", root.get_submodule("fusion_encoder"), inputs, self.outputs(text, regions)),)

    def outputs(self, text: Dim, regions: Dim) -> tuple[TensorSpec, ...]:
        """What the head gives."""
        both = Dim("text+regions", text.min + regions.min, text.max + regions.max)
        if self.task == "encode":
            width = self.text.hidden_size
            return TensorSpec("last_hidden_state", (1, both, width)), TensorSpec("pooler_output", (1, width))
        if self.task == "pretrain":
            scores = TensorSpec("prediction_logits", (1, both, self.text.vocab_size))
            return scores, TensorSpec("seq_relationship_logits", (1, 2))
        if self.task == "align":
            phrases = Dim("phrases", 1, self.text.max_position_embeddings)
            return (TensorSpec("logits", (1, phrases, regions)),)
        return (TensorSpec("logits", (1, self.labels)),)

    def source(self, parameter: str) -> Source:
        rest = parameter.removeprefix("fusion_encoder.")
        if rest.startswith("layers."):
            _, number, part = rest.split(".", 2)
            return Source(f"visual_bert.encoder.layer.{number}.{public_part(part)}")
        if rest.startswith("additional_layer."):
            return Source(f"visual_bert.additional_layer.{public_part(rest.removeprefix('additional_layer.'))}")
        if rest == "head.predictions.decoder.weight" and self.tied:
            return Source("visual_bert.embeddings.word_embeddings.weight")
        places = {
            "embeddings.norm.": "visual_bert.embeddings.LayerNorm.",
            "embeddings.": "visual_bert.embeddings.",
            "head.pooler.": "visual_bert.pooler.",
            "head.predictions.dense.": "cls.predictions.transform.dense.",
            "head.predictions.norm.": "cls.predictions.transform.LayerNorm.",
            "head.predictions.decoder.bias": "cls.predictions.bias",
            "head.predictions.": "cls.predictions.",
            "head.seq_relationship.": "cls.seq_relationship.",
            "head.cls.": "cls.",
            "head.query.": "attention.query.",
            "head.key.": "attention.key.",
        }
        ours = next(place for place in places if rest.startswith(place))
        return Source(places[ours] + rest.removeprefix(ours))


ARCHITECTURE = VisualBert
