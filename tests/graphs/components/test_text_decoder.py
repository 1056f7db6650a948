"""The LLaMA decoder against transformers' on shared random weights, through its cache."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graphs.components.text.config import TextConfig
from graphs.components.text.decoder import TextDecoder
from tests.numbers import relative_l2

CONFIGS = {
    "multi-head": TextConfig(64, 112, 3, 4, 4, 97, max_position_embeddings=48),
    "grouped": TextConfig(48, 80, 2, 6, 2, 50, max_position_embeddings=40, rope_theta=5e5, rms_norm_eps=1e-5),
    "wide heads": TextConfig(48, 80, 2, 2, 1, 50, max_position_embeddings=40, head_dim=32),
}


def pair(config: TextConfig) -> tuple[TextDecoder, LlamaForCausalLM]:
    known = {*inspect.signature(LlamaConfig).parameters, "rope_theta"}
    values = {key: value for key, value in vars(config).items() if key in known and (value or key != "head_dim")}
    reference = LlamaForCausalLM(LlamaConfig(**values)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.3)
    decoder = TextDecoder(config, config.max_position_embeddings).eval()
    public = {name.removeprefix("model."): tensor for name, tensor in reference.state_dict().items()}
    names = [name for name, _ in decoder.named_parameters()]
    decoder.load_state_dict({name: public[name] for name in names}, strict=False)
    return decoder, reference


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decode_equal_transformers(name: str) -> None:
    config = CONFIGS[name]
    decoder, reference = pair(config)
    total = 20
    embeds = torch.randn(1, total, config.hidden_size)
    with torch.no_grad():
        expected = reference(inputs_embeds=embeds).logits
        logits = [decoder(embeds[:, :13], torch.arange(13))]
        logits += [decoder(embeds[:, s : s + 1], torch.tensor([s])) for s in range(13, 17)]
        logits += [decoder(embeds[:, 17:], torch.arange(17, total))]
    assert relative_l2(torch.cat(logits, dim=1), expected) <= 1e-5


def test_a_full_context_equals_transformers() -> None:
    config = CONFIGS["grouped"]
    decoder, reference = pair(config)
    embeds = torch.randn(1, config.max_position_embeddings, config.hidden_size)
    with torch.no_grad():
        expected = reference(inputs_embeds=embeds).logits
        actual = decoder(embeds, torch.arange(config.max_position_embeddings))
    assert relative_l2(actual, expected) <= 1e-5


def test_a_new_sequence_does_not_see_the_old_one() -> None:
    decoder, _ = pair(CONFIGS["multi-head"])
    embeds = torch.randn(1, 9, 64)
    with torch.no_grad():
        first = decoder(embeds[:, :3], torch.arange(3))
        decoder(torch.randn(1, 30, 64), torch.arange(30))
        again = decoder(embeds[:, :3], torch.arange(3))
    assert relative_l2(again, first) <= 1e-6
