"""The OPT decoder (Zhang et al., arXiv 2205.01068): layer norms in front, biases everywhere, learned positions.

Its blocks are those of `TextDecoder`, with plain MLPs and heads that positions do not turn.
Shape suffixes: S new tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from graphs.components.activations import ACTIVATIONS
from graphs.components.stack import AlikeLayers
from graphs.components.text.cache import causal_mask
from graphs.components.text.config import TextConfig
from graphs.components.text.decoder import DecoderLayer, norm
from graphs.config import ConfigReader

#: rows of the table of positions before that of the first
OFFSET = 2


def read_opt(config: ConfigReader) -> TextConfig:
    """The decoder that a `text_config` describes, with transformers' defaults. Raises: UserError naming the key."""
    width, heads = config.int("hidden_size", 768), config.int("num_attention_heads", 12, high=1024)
    if width % heads:
        raise config.error(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    if config.int("word_embed_proj_dim", width) != width:
        raise config.error("word_embed_proj_dim is not hidden_size; embeddings of pictures and of text must be as wide")
    usual = {"do_layer_norm_before": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False}
    for key, value in usual.items():
        if config.bool(key, value) is not value:
            raise config.error(f"{key} is {str(not value).lower()}, as in no decoder of this system; not supported")
    bias = config.bool("enable_bias", True)
    return TextConfig(
        hidden_size=width,
        intermediate_size=config.int("ffn_dim", 3072),
        num_hidden_layers=config.int("num_hidden_layers", 12, high=1024),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=config.int("vocab_size", 50272, high=1 << 24),
        max_position_embeddings=config.int("max_position_embeddings", 2048, high=1 << 24),
        rms_norm_eps=1e-5,  # no config.json says another
        hidden_act=config.choice("activation_function", ACTIVATIONS, default="relu"),
        tie_word_embeddings=config.bool("tie_word_embeddings", True),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm="layer",
        mlp="plain",
    )


class OptDecoder(AlikeLayers):
    """Embeddings [1, S, D] at positions [S] (int64) to logits [1, S, V]; each call extends the cache it owns."""

    def __init__(self, config: TextConfig, context: int) -> None:
        super().__init__()
        self.context = context
        self.positions = nn.Embedding(config.max_position_embeddings + OFFSET, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, context) for _ in range(config.num_hidden_layers))
        self.norm = norm(config, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, inputs_embeds: Tensor, cache_position: Tensor) -> Tensor:
        x_1SD = inputs_embeds + self.positions(cache_position + OFFSET)
        mask_SC = causal_mask(cache_position, self.context, x_1SD.dtype)
        for layer in self.layers:
            x_1SD = layer(x_1SD, None, None, mask_SC, cache_position)
        return self.lm_head(self.norm(x_1SD))


#: parts of a block here -> in checkpoints
PARTS: Mapping[str, str] = {
    "input_layernorm.": "self_attn_layer_norm.",
    "self_attn.o_proj.": "self_attn.out_proj.",
    "post_attention_layernorm.": "final_layer_norm.",
    "mlp.up_proj.": "fc1.",
    "mlp.down_proj.": "fc2.",
    "": "",
}


def public_name(parameter: str, text: TextConfig) -> str:
    """What checkpoints call a parameter, given by its name in the root module."""
    rest = parameter.removeprefix("text_decoder.")
    if rest.startswith("layers."):
        _, number, part = rest.split(".", 2)
        ours = next(prefix for prefix in PARTS if part.startswith(prefix))
        return f"model.decoder.layers.{number}.{PARTS[ours]}{part.removeprefix(ours)}"
    own = {"positions.weight": "model.decoder.embed_positions.weight", "lm_head.weight": "lm_head.weight"}
    if rest in own and not (rest == "lm_head.weight" and text.tie_word_embeddings):
        return own[rest]
    return f"model.decoder.final_layer_{rest}" if rest.startswith("norm.") else "model.decoder.embed_tokens.weight"
