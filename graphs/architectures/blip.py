"""BLIP (Li et al., arXiv 2201.12086): a picture captioned, asked about, or compared with texts, by one kind of BERT.

Which of the three a checkpoint does, its `architectures` say. No picture becomes tokens: every layer of the text model
attends to the picture's states, whose keys and values the picture's encoder makes, once. A caption is decoded from
them; a question is encoded with them, and its answer decoded from the question's states; a text is matched with them
(two classes), or compared with the picture by the cosine of their first tokens' projections, without them.
Weights in the layout of transformers' classes, which is that of the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from graphs.components.dual import MAX_SCORED
from graphs.components.grounding import Cosines, ImageEncoder, Matching, QuestionEncoder, TextEncoder, cross_caches
from graphs.components.image_text import VisionEncoder
from graphs.components.text.bert import BERT_BASE, BertConfig, public_part
from graphs.components.text.cache import caches
from graphs.components.text.med import MedDecoder, MedEncoder
from graphs.components.vision.blip import BLIP_BASE, BlipVisionTower, read_blip_tower, tower_source
from graphs.components.vision.clip import ClipVisionConfig
from graphs.config import ConfigReader
from graphs.errors import nearest
from graphs.files import shown
from graphs.preprocess.image import ImageProcessor, read_processor
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Architecture, Dim, Method, TensorSpec, Variant
from graphs.weights import Source

#: a class of `architectures` -> what its checkpoints do
TASKS: Mapping[str, str] = {
    "BlipForConditionalGeneration": "caption",
    "BlipForQuestionAnswering": "answer",
    "BlipForImageTextRetrieval": "retrieve",
}
MED_BASE = replace(BERT_BASE, vocab_size=30524)


@dataclass(frozen=True)
class Marks:
    """Ids of the text model: `begin` a text that is decoded, and `end` it."""

    begin: int = 30522
    end: int = 102


@dataclass(frozen=True)
class Blip(Architecture):
    """Configuration of one BLIP. `task`: a value of `TASKS`. `shared`: width of the space of the cosines.

    `tied`: whether the decoder's head is its words.
    """

    name = "blip"
    kind = "captioner"
    unused = (
        r".*\.embeddings\.position_ids",
        r"text_decoder\.cls\.predictions\.decoder\.bias",  # the other name of predictions.bias
    )

    vision: ClipVisionConfig
    text: BertConfig
    task: str = "caption"
    shared: int = 256
    marks: Marks = Marks()
    tied: bool = True
    processor: ImageProcessor | None = None  # None: stretched to the tower's size
    max_context: int = 512

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        large = replace(
            BLIP_BASE, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
        )
        tower = replace(
            BLIP_BASE,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=48,
            patch_size=8,
        )
        text, hub = BertConfig(48, 96, 2, 4, 256, 64), "Salesforce/blip"
        marks = Marks(254, 255)
        return (
            Variant("tiny", cls(tower, text, marks=marks)),
            Variant("tiny-vqa", cls(replace(tower, hidden_size=48), text, "answer", marks=marks)),
            Variant("tiny-itm", cls(tower, text, "retrieve", 32, marks)),
            Variant("blip-base-captioning", cls(BLIP_BASE, MED_BASE), f"{hub}-image-captioning-base", 224_000_000),
            Variant("blip-base-itm", cls(BLIP_BASE, MED_BASE, "retrieve"), f"{hub}-itm-base-coco", 224_000_000),
            Variant("blip-base-vqa", cls(BLIP_BASE, MED_BASE, "answer"), f"{hub}-vqa-base", 362_000_000),
            Variant("blip-large-captioning", cls(large, MED_BASE), f"{hub}-image-captioning-large", 446_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        names = config.get("architectures") or ["BlipForConditionalGeneration"]
        name = str(names[0]) if isinstance(names, list) else str(names)
        if name not in TASKS:
            raise reader.error(f"architectures names {shown(name, 60)}; {nearest(name, TASKS)}")
        section = reader.section("text_config")
        vision = read_blip_tower(reader.section("vision_config"), BLIP_BASE)
        # The class's default is 8 heads, which no published checkpoint has; each says its own.
        text = BertConfig.from_reader(section, replace(MED_BASE, num_attention_heads=8))
        if TASKS[name] == "answer" and vision.hidden_size != text.hidden_size:
            raise reader.error(
                f"answers are decoded from questions {text.hidden_size} wide by a decoder that reads pictures "
                f"{vision.hidden_size} wide: the two must be equal"
            )
        return cls(
            vision=vision,
            text=text,
            task=TASKS[name],
            shared=reader.int("image_text_hidden_size", 256),
            marks=Marks(
                section.int("bos_token_id", 30522, low=0, high=text.vocab_size - 1),
                section.int("sep_token_id", 102, low=0, high=text.vocab_size - 1),
            ),
            processor=read_processor(preprocessor, vision.image_size),
        )

    def given(self, tensors: Container[str]) -> Self:
        """A head of its own counts, whatever config.json says of ties: transformers reads such checkpoints so."""
        return replace(self, tied="text_decoder.cls.predictions.decoder.weight" not in tensors)

    def with_context(self, max_context: int) -> Self:
        return replace(self, max_context=max_context)

    @property
    def context(self) -> int:
        """Tokens that the decoder's cache holds."""
        return min(self.text.max_position_embeddings, self.max_context)

    def facts(self) -> dict[str, Any]:
        decodes = {} if self.task == "retrieve" else {"context": self.context}
        compares = {"embedding_size": self.shared} if self.task == "retrieve" else {}
        return {
            **decodes,
            **compares,
            "image_size": self.vision.image_size,
            "text_length": self.text.max_position_embeddings,
            "layers": self.text.num_hidden_layers,
            "vocab_size": self.text.vocab_size,
        }

    def build(self) -> nn.Module:
        root, text, width = nn.Module(), self.text, self.text.hidden_size
        tower = BlipVisionTower(self.vision)
        vision = VisionEncoder(self.image_processor, tower, cross_caches(text, self.vision.hidden_size))
        if self.task == "retrieve":
            encoder = MedEncoder(text)
            root.image_encoder = ImageEncoder(vision, self.vision.hidden_size, self.shared)
            root.text_encoder = TextEncoder(encoder, width, self.shared)
            root.similarity = Cosines()
            root.matching = Matching(text, encoder)
            return root
        root.vision_encoder = vision
        root.token_embedding = nn.Embedding(text.vocab_size, width)
        if self.task == "answer":
            root.text_encoder = QuestionEncoder(text)
        root.text_decoder = MedDecoder(text, self.context)
        return root

    def methods(self, root: nn.Module) -> tuple[Method, ...]:
        by_task: Mapping[str, Callable[[nn.Module], tuple[Method, ...]]] = {
            "caption": self.captioning,
            "answer": self.answering,
            "retrieve": self.retrieving,
        }
        return by_task[self.task](root)

    @property
    def pixels(self) -> TensorSpec:
        side = self.vision.image_size
        return TensorSpec("pixel_values", (1, 3, side, side), torch.uint8, "pixels")

    def ids(self, length: Dim) -> TensorSpec:
        return TensorSpec("input_ids", (1, length), torch.int64, "ids", self.text.vocab_size)

    def crossed(self, name: str, states: int | Dim) -> tuple[TensorSpec, ...]:
        """Keys and values of all layers."""
        shape = (self.text.num_hidden_layers, self.text.num_attention_heads, states, self.text.head_width)
        return tuple(TensorSpec(f"{name}_{part}", shape) for part in ("keys", "values"))

    def decoding(self, root: nn.Module, seen: tuple[TensorSpec, ...]) -> tuple[Method, Method]:
        """`token_embedding`, and `text_decoder` over what is `seen`."""
        decoder, length = root.get_submodule("text_decoder"), Dim("sequence", 1, self.context)
        embeds = TensorSpec("inputs_embeds", (1, length, self.text.hidden_size))
        position = TensorSpec("cache_position", (length,), torch.int64, "positions")
        logits = TensorSpec("logits", (1, length, self.text.vocab_size))
        return (
            Method("token_embedding", root.get_submodule("token_embedding"), (self.ids(length),), (embeds,)),
            Method("text_decoder", decoder, (embeds, position, *seen), (logits,), caches(decoder)),
        )

    def captioning(self, root: nn.Module) -> tuple[Method, ...]:
        seen = self.crossed("cross", self.vision.tokens)
        vision = Method("vision_encoder", root.get_submodule("vision_encoder"), (self.pixels,), seen)
        return (vision, *self.decoding(root, seen))

    def answering(self, root: nn.Module) -> tuple[Method, ...]:
        image = self.crossed("image", self.vision.tokens)
        length = Dim("question", 1, self.text.max_position_embeddings)
        question = self.crossed("cross", length)
        vision = Method("vision_encoder", root.get_submodule("vision_encoder"), (self.pixels,), image)
        encoder = Method("text_encoder", root.get_submodule("text_encoder"), (self.ids(length), *image), question)
        embedding, decoder = self.decoding(root, question)
        return vision, embedding, encoder, decoder

    def retrieving(self, root: nn.Module) -> tuple[Method, ...]:
        seen = self.crossed("cross", self.vision.tokens)
        image, text = (TensorSpec(f"{name}_embeds", (1, self.shared)) for name in ("image", "text"))
        ids = self.ids(Dim("sequence", 1, self.text.max_position_embeddings))
        images, texts = Dim("images", 1, MAX_SCORED), Dim("texts", 1, MAX_SCORED)
        scored = tuple(replace(one, shape=(count, self.shared)) for one, count in ((image, images), (text, texts)))
        cosines = TensorSpec("cosines", (images, texts))
        logits = TensorSpec("match_logits", (1, 2))
        return (
            Method("image_encoder", root.get_submodule("image_encoder"), (self.pixels,), (image, *seen)),
            Method("text_encoder", root.get_submodule("text_encoder"), (ids,), (text,)),
            Method("similarity", root.get_submodule("similarity"), scored, (cosines,)),
            Method("matching", root.get_submodule("matching"), (ids, *seen), (logits,)),
        )

    def source(self, parameter: str) -> Source:
        ours, theirs = next((ours, theirs) for ours, theirs in self.places.items() if parameter.startswith(ours))
        rest = parameter.removeprefix(ours)
        if theirs == "vision_model.":
            return tower_source(rest, self.vision)
        if not theirs.endswith("layer."):
            return Source(theirs + rest)
        number, part = rest.split(".", 1)
        if ours.endswith(("cross.layers.", "projector.layers.")):
            return Source(f"{theirs}{number}.{public_part(f'cross_keys_values.{part}')}")
        return Source(f"{theirs}{number}.{public_part(f'cross.{part}' if ours.endswith('crosses.') else part)}")

    @property
    def places(self) -> Mapping[str, str]:
        """Where parameters begin here -> where in the public layout."""
        bert, head = "text_decoder.bert.", "text_decoder.cls.predictions."
        words = f"{bert}embeddings.word_embeddings."
        encoder = "text_encoder."
        grounded = {"answer": "text_encoder.grounded.", "retrieve": "matching.grounded."}.get(self.task, "")
        text = "text_encoder.text." if self.task == "retrieve" else f"{grounded}text."
        picture = bert if self.task == "caption" else encoder
        return {
            "vision_encoder.tower.": "vision_model.",
            "image_encoder.tower.": "vision_model.",
            "vision_encoder.projector.layers.": f"{picture}encoder.layer.",
            "image_encoder.cross.layers.": f"{picture}encoder.layer.",
            "image_encoder.projection.": "vision_proj.",
            "text_encoder.projection.": "text_proj.",
            "matching.head.": "itm_head.",
            f"{text}embeddings.norm.": f"{encoder}embeddings.LayerNorm.",
            f"{text}embeddings.": f"{encoder}embeddings.",
            f"{text}layers.": f"{encoder}encoder.layer.",
            f"{grounded}crosses.": f"{encoder}encoder.layer.",
            "text_encoder.cross.layers.": f"{bert}encoder.layer.",
            "token_embedding.": words,
            "text_decoder.position_embeddings.": f"{bert}embeddings.position_embeddings.",
            "text_decoder.norm.": f"{bert}embeddings.LayerNorm.",
            "text_decoder.layers.": f"{bert}encoder.layer.",
            "text_decoder.head.dense.": f"{head}transform.dense.",
            "text_decoder.head.norm.": f"{head}transform.LayerNorm.",
            "text_decoder.head.decoder.weight": f"{words}weight" if self.tied else f"{head}decoder.weight",
            "text_decoder.head.decoder.bias": f"{head}bias",
        }

    @property
    def image_processor(self) -> ImageProcessor:
        side = self.vision.image_size
        return self.processor or ImageProcessor(None, side, side, crop_size=None)

    @property
    def template(self) -> PromptTemplate | None:
        """A caption goes on from the user's words; a question stands between BERT's special tokens."""
        if self.task == "retrieve":
            return None
        start, stop = (self.marks.begin,), (self.marks.end,)
        if self.task == "caption":
            return PromptTemplate(image_separator="", start=start, stop=stop)
        return PromptTemplate(user="[CLS]", assistant="[SEP]", image_separator="", start=start, stop=stop)


ARCHITECTURE = Blip
