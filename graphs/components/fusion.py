"""VisualBERT (Li et al., arXiv 1908.03557): regions of a picture behind the words of a text in one BERT; and its heads.

Texts come alone, never padded, so nothing is masked.
Shape suffixes: T tokens of the text, N regions, S = T + N, C positions, V width of a region's features,
D width, P phrases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from graphs.components.text.bert import BertConfig, BertLayer, BertPooler, BertVocabularyHead

#: a text's tokens, of which the one before the last answers a question
MIN_TEXT = 2


class FusionEmbeddings(nn.Module):
    """A text's ids, and regions with the words that speak of them, to embeddings [1, S, D].

    A region has the mean position of those words, given by the weights of all positions, and one that regions share.
    """

    def __init__(self, config: BertConfig, types: int, features: int) -> None:
        super().__init__()
        width, positions = config.hidden_size, config.max_position_embeddings
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(types, width)
        self.visual_token_type_embeddings = nn.Embedding(types, width)
        self.visual_position_embeddings = nn.Embedding(positions, width)
        self.visual_projection = nn.Linear(features, width)
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, ids: Tensor, types: Tensor, features: Tensor, region_types: Tensor, words: Tensor) -> Tensor:
        text_1TD = self.word_embeddings(ids) + self.token_type_embeddings(types)
        text_1TD = text_1TD + self.position_embeddings.weight[: ids.shape[1]]
        regions_1ND = self.visual_projection(features) + self.visual_token_type_embeddings(region_types)
        spoken_1ND = words @ self.position_embeddings.weight
        regions_1ND = regions_1ND + spoken_1ND + self.visual_position_embeddings.weight[:1]
        return self.norm(torch.cat([text_1TD, regions_1ND], dim=1))


class FusionEncoder(nn.Module):
    """Ids [1, T], types [1, T], features [1, N, V], types [1, N], words [1, N, C], and [1, P] for `AlignmentHead`.

    Ids, types and positions are int64. With `bypass`, layers see the text alone, and regions join in one more.
    """

    def __init__(self, config: BertConfig, types: int, features: int, head: nn.Module, bypass: bool) -> None:
        super().__init__()
        self.embeddings = FusionEmbeddings(config, types, features)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.additional_layer = BertLayer(config) if bypass else None
        self.head = head

    def states(self, x_1SD: Tensor, length: int) -> Tensor:
        """The last states [1, S, D]; the first `length` are the text's."""
        regions_1ND = x_1SD[:, length:]
        x_1SD = x_1SD if self.additional_layer is None else x_1SD[:, :length]
        for layer in self.layers:
            x_1SD = layer(x_1SD)
        if self.additional_layer is None:
            return x_1SD
        joined: Tensor = self.additional_layer(torch.cat([x_1SD, regions_1ND], dim=1))
        return joined

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        visual_embeds: Tensor,
        visual_token_type_ids: Tensor,
        word_weights: Tensor,
        region_to_phrase_position: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        length = input_ids.shape[1]
        embeds = self.embeddings(input_ids, token_type_ids, visual_embeds, visual_token_type_ids, word_weights)
        positions = () if region_to_phrase_position is None else (region_to_phrase_position,)
        outputs: Tensor | tuple[Tensor, Tensor] = self.head(self.states(embeds, length), length, *positions)
        return outputs


class StatesHead(nn.Module):
    """The states [1, S, D], and the first of them pooled [1, D]."""

    def __init__(self, config: BertConfig, labels: int) -> None:
        super().__init__()
        self.pooler = BertPooler(config)

    def forward(self, states_1SD: Tensor, length: int) -> tuple[Tensor, Tensor]:
        return states_1SD, self.pooler(states_1SD)


class PretrainingHead(nn.Module):
    """Scores of the vocabulary [1, S, V] for every state, and whether the text fits [1, 2]."""

    def __init__(self, config: BertConfig, labels: int) -> None:
        super().__init__()
        self.pooler = BertPooler(config)
        self.predictions = BertVocabularyHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, states_1SD: Tensor, length: int) -> tuple[Tensor, Tensor]:
        return self.predictions(states_1SD), self.seq_relationship(self.pooler(states_1SD))


class PooledHead(nn.Module):
    """Scores of labels [1, labels] from the pooled state: one for a choice, or those of visual reasoning."""

    def __init__(self, config: BertConfig, labels: int) -> None:
        super().__init__()
        self.pooler = BertPooler(config)
        self.cls = nn.Linear(config.hidden_size, labels)

    def forward(self, states_1SD: Tensor, length: int) -> Tensor:
        return self.cls(self.pooler(states_1SD))


class AnswerHead(nn.Module):
    """Scores of answers [1, labels] from the state of the text's token before the last."""

    def __init__(self, config: BertConfig, labels: int) -> None:
        super().__init__()
        self.cls = nn.Linear(config.hidden_size, labels)

    def forward(self, states_1SD: Tensor, length: int) -> Tensor:
        text_1TD = states_1SD[:, :length]
        return self.cls(text_1TD[:, -MIN_TEXT])


class AlignmentHead(nn.Module):
    """Scores [1, P, N] of regions for phrases, given by the positions [1, P] (int64) of their states, -1 for none."""

    def __init__(self, config: BertConfig, labels: int) -> None:
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.head_width)
        self.key = nn.Linear(config.hidden_size, config.head_width)

    def forward(self, states_1SD: Tensor, length: int, position_1P: Tensor) -> Tensor:
        place_P = (position_1P * (position_1P >= 0).to(torch.int64)).reshape(-1)
        query_1PK = self.query(states_1SD.index_select(1, place_P))
        key_1NK = self.key(states_1SD[:, length:])
        return query_1PK @ key_1NK.transpose(1, 2) * query_1PK.shape[-1] ** -0.5


#: what a checkpoint does -> its head
HEADS: Mapping[str, Callable[[BertConfig, int], nn.Module]] = {
    "encode": StatesHead,
    "pretrain": PretrainingHead,
    "choose": PooledHead,
    "reason": PooledHead,
    "answer": AnswerHead,
    "align": AlignmentHead,
}
