"""The Q-Former of BLIP-2 (Li et al., arXiv 2301.12597) and InstructBLIP (Dai et al., arXiv 2305.06500).

Learned queries attend to each other, to the instruction where there is one, and in every second layer to the picture.
Instruction and queries share self-attention, but have feed-forward networks of their own; only queries see the picture.
One instruction is read at a time, so nothing is padded and nothing masked.
Shape suffixes: Q queries, S queries and the tokens of the instruction, T states of the picture, D width, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from graphs.components.text.bert import BERT_BASE, Attend, BertConfig, BertMLP, public_part
from graphs.config import ConfigReader
from graphs.sources import Source


@dataclass(frozen=True)
class QFormerConfig:
    """`blocks`: BERT's. `queries`: how many. `frequency`: every how many-th layer sees the picture, the first among
    them. `reads_text`: whether an instruction is read besides."""

    blocks: BertConfig = BERT_BASE
    queries: int = 32
    frequency: int = 2
    reads_text: bool = False

    @classmethod
    def from_reader(cls, config: ConfigReader, reads_text: bool) -> Self:
        """From the whole config.json, of which `qformer_config` is a section. Raises: UserError."""
        section = config.section("qformer_config")
        return cls(
            BertConfig.from_reader(section, BERT_BASE),
            config.int("num_query_tokens", 32, high=1 << 16),
            section.int("cross_attention_frequency", 2, high=1024),
            reads_text,
        )


class QFormerLayer(nn.Module):
    """One block over queries [1, Q, D], with the instruction's tokens behind them, [1, S, D], where it is read."""

    def __init__(self, config: QFormerConfig, crosses: bool, seen_width: int) -> None:
        super().__init__()
        blocks = config.blocks
        self.queries = config.queries
        self.keys_values = blocks.reader(blocks.hidden_size)
        self.attention = Attend(blocks)
        self.cross_keys_values = blocks.reader(seen_width) if crosses else None
        self.cross = Attend(blocks) if crosses else None
        self.query_mlp = BertMLP(blocks)
        self.mlp = BertMLP(blocks) if config.reads_text else None

    def forward(self, x_1SD: Tensor, seen_1TE: Tensor) -> Tensor:
        x_1SD = self.attention(x_1SD, self.keys_values(x_1SD))
        queries_1QD = x_1SD if self.mlp is None else x_1SD[:, : self.queries]
        if self.cross is not None and self.cross_keys_values is not None:
            queries_1QD = self.cross(queries_1QD, self.cross_keys_values(seen_1TE))
        queries_1QD = self.query_mlp(queries_1QD)
        return queries_1QD if self.mlp is None else torch.cat([queries_1QD, self.mlp(x_1SD[:, self.queries :])], dim=1)


class InstructionEmbeddings(nn.Module):
    """Ids [1, S] (int64) of the Q-Former's own vocabulary to embeddings [1, S, D], positions added, not yet normed."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.word_embeddings(input_ids) + self.position_embeddings.weight[: input_ids.shape[1]]


class QFormer(nn.Module):
    """A picture's states [1, T, E] to its queries' projected states [1, Q, width], reading ids [1, S] where it can."""

    def __init__(self, config: QFormerConfig, seen_width: int, width: int) -> None:
        super().__init__()
        blocks = config.blocks
        self.queries = config.queries
        self.query_tokens = nn.Parameter(torch.zeros(1, config.queries, blocks.hidden_size))
        self.embeddings = InstructionEmbeddings(blocks) if config.reads_text else None
        self.layernorm = nn.LayerNorm(blocks.hidden_size, blocks.layer_norm_eps)
        self.layers = nn.ModuleList(
            QFormerLayer(config, not index % config.frequency, seen_width) for index in range(blocks.num_hidden_layers)
        )
        self.language_projection = nn.Linear(blocks.hidden_size, width)

    def forward(self, seen_1TE: Tensor, input_ids: Tensor | None = None) -> Tensor:
        x_1SD: Tensor = self.query_tokens
        if self.embeddings is not None and input_ids is not None:
            x_1SD = torch.cat([x_1SD, self.embeddings(input_ids)], dim=1)
        x_1SD = self.layernorm(x_1SD)
        for layer in self.layers:
            x_1SD = layer(x_1SD, seen_1TE)
        return self.language_projection(x_1SD[:, : self.queries] if self.embeddings is not None else x_1SD)


def qformer_source(parameter: str, config: QFormerConfig) -> Source:
    """Where checkpoints keep a parameter of a `QFormer`, given by its name there."""
    if parameter.startswith("layers."):
        _, number, part = parameter.split(".", 2)
        return Source(f"qformer.encoder.layer.{number}.{public_part(part, 'attention')}")
    if parameter.startswith("layernorm."):
        return Source(f"qformer.{'embeddings.' if config.reads_text else ''}{parameter}")
    return Source(f"qformer.{parameter}" if parameter.startswith("embeddings.") else parameter)
