"""BLIP's mixture of encoder and decoder (Li et al., arXiv 2201.12086, figure 2): BERT's blocks in three modes.

Alone they encode a text; with cross-attention to a picture they encode a text about it; with a causal mask and a cache
they decode one. What cross-attention reads is given as keys and values of all layers, [L, A, M, K] each.
Shape suffixes: S tokens, M states of the picture or of the question, D width, A heads, K head width, L layers,
V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from graphs.components.text.bert import Attend, BertConfig, BertLayer, BertVocabularyHead
from graphs.components.text.cache import causal_mask
from graphs.components.text.cross import of_layer


class MedEmbeddings(nn.Module):
    """Ids [1, S] (int64) to words at their positions, normed, [1, S, D]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        words_1SD = self.word_embeddings(input_ids)
        return self.norm(words_1SD + self.position_embeddings.weight[: input_ids.shape[1]])


class MedEncoder(nn.Module):
    """Ids [1, S] (int64) to states [1, S, D] of the text alone."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = MedEmbeddings(config)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids: Tensor) -> Tensor:
        x_1SD = self.embeddings(input_ids)
        for layer in self.layers:
            x_1SD = layer(x_1SD)
        return x_1SD


class GroundedEncoder(nn.Module):
    """Ids [1, S] (int64) and a picture's keys and values to states [1, S, D]; `text` may serve for texts alone too."""

    def __init__(self, config: BertConfig, text: MedEncoder) -> None:
        super().__init__()
        self.text = text
        self.crosses = nn.ModuleList(Attend(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids: Tensor, keys_LAMK: Tensor, values_LAMK: Tensor) -> Tensor:
        x_1SD = self.text.embeddings(input_ids)
        for index, cross in enumerate(self.crosses):
            layer = self.text.layers[index]
            assert isinstance(layer, BertLayer)
            x_1SD = layer.mlp(cross(layer.attended(x_1SD), of_layer(keys_LAMK, values_LAMK, index)))
        return x_1SD


class MedDecoder(nn.Module):
    """Words [1, S, D] at positions [S] (int64), and what they are about, to logits [1, S, V]; it extends its cache."""

    def __init__(self, config: BertConfig, context: int) -> None:
        super().__init__()
        self.context = context
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(BertLayer(config, True, context) for _ in range(config.num_hidden_layers))
        self.head = BertVocabularyHead(config)

    def forward(
        self, inputs_embeds: Tensor, cache_position: Tensor, cross_keys: Tensor, cross_values: Tensor
    ) -> Tensor:
        x_1SD = self.norm(inputs_embeds + self.position_embeddings(cache_position))
        mask_SC = causal_mask(cache_position, self.context, x_1SD.dtype)
        for index, layer in enumerate(self.layers):
            x_1SD = layer(x_1SD, mask_SC, of_layer(cross_keys, cross_values, index), cache_position)
        return self.head(x_1SD)
