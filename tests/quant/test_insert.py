"""Quantized programs of the trained nano, against the same arithmetic written as modules of torch."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from calibration.prompts import Prompter
from calibration.samples import zoo_samples
from calibration.source import Calibration
from calibration.statistics import Statistics
from graphs.dialogue import Dialogue
from graphs.errors import UserError
from graphs.model import Model, Request, load_model
from graphs.program import Program
from graphs.trace import trace
from quant.apply import Quantization
from quant.precision import CastFloats
from quant.recipe import Recipe, Rule
from quant.resolve import Resolved, resolve
from runtimes.eager import EagerRuntime
from tests.quant.everything import Everything

EVERYTHING = Everything()
LENGTH = 77


@cache
def nano() -> tuple[Model, Program]:
    model = load_model(Request("mobilevlm", checkpoint="zoo:mobilevlm-nano"))
    return model, trace(model.architecture, model.weights)


@cache
def statistics() -> Statistics:
    return Calibration(count=8).statistics(*nano(), "", True, lambda line: None)


def made(*rules: Rule, kv_cache: str = "float", modality: str = "balanced", takes: Everything = EVERYTHING) -> Program:
    _, program = nano()
    resolved = resolve(Recipe("test", "", "float32", (kv_cache,), modality, rules), program, "test", takes)
    quantized = Quantization(resolved, statistics()).apply(program)
    quantized.check()
    again = Resolved.from_json(resolved.to_json(), program)
    assert again.counts() == resolved.counts()
    return quantized


def run(program: Program, method: str, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return program.module(method)(*inputs)


@cache
def embeddings() -> Tensor:
    """A held-out picture and its question, as the decoder reads them."""
    model, program = nano()
    prompt = Prompter(model, program, 0)(next(iter(zoo_samples(1, 5))))
    return torch.from_numpy(Dialogue(EagerRuntime(program)).embed(prompt.pieces).embeds_1SD)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def decoder_error(program: Program) -> float:
    inputs = embeddings(), torch.arange(LENGTH)
    return error(run(program, "text_decoder", *inputs), run(nano()[1], "text_decoder", *inputs))


def test_embedding_rows_are_gathered_as_integers() -> None:
    program = made(Rule("token_embedding", ("w8",)))
    state = program.methods["token_embedding"].exported.state_dict
    assert {name: tuple(t.shape) for name, t in state.items()} == {"weight_q": (491, 192), "weight_scale": (491, 1)}
    found = run(program, "token_embedding", torch.arange(256)[None])
    weight = nano()[1].tensor("token_embedding", "weight")
    scale = torch.maximum(weight.amax(1) / 127, -weight.amin(1) / 128)[:, None]
    assert (found[0] - weight[:256]).abs().max() <= scale.max() / 2 * 1.001


@pytest.mark.parametrize(
    ("scheme", "limit"),
    [
        ("w8", 0.01),
        ("w4g32", 0.12),
        ("w8a8t", 0.03),
        ("w8g32a8b", 0.02),
        ("w4g32za8t", 0.12),
        ("w8a8", 0.06),
        ("f8af8", 0.12),
        ("p8", 0.02),
    ],
)
def test_schemes_stay_near_the_float_decoder(scheme: str, limit: float) -> None:
    found = decoder_error(made(Rule("text_decoder/layers*", (scheme,), scales="mse")))
    assert 1e-4 < found < limit


def test_one_layer_computes_what_its_definition_says() -> None:
    program = made(Rule("text_decoder/lm_head", ("w4g32",)))
    weight = nano()[1].tensor("text_decoder", "lm_head.weight")
    parts = {name: program.tensor("text_decoder", f"lm_head.weight_{name}") for name in ("q", "scale")}
    assert parts["q"].dtype == torch.int8
    assert int(parts["q"].min()) >= -8
    assert int(parts["q"].max()) <= 7
    rounded = parts["q"].view(491, 6, 32) * parts["scale"].unsqueeze(-1)
    assert ((rounded - weight.view(491, 6, 32)).abs() <= parts["scale"].unsqueeze(-1) * 0.51).all()
    # The head is the last operator: its output is linear in its weight, whatever came before.
    inputs = embeddings(), torch.arange(LENGTH)
    states = torch.linalg.lstsq(weight, run(nano()[1], "text_decoder", *inputs)[0].T).solution
    expected = (rounded.view(491, 192) @ states).T[None]
    assert error(run(program, "text_decoder", *inputs), expected) < 1e-4


def test_rescaling_alone_changes_nothing() -> None:
    """Factors of SmoothQuant and AWQ cancel: with eight bits and no activations only rounding is left."""
    _, program = nano()
    for name in ("smoothquant", "awq"):
        rule = Rule("text_decoder/*", ("w8",), "linear", "rtn", name)
        resolved = resolve(Recipe("test", "", "float32", layers=(rule,)), program, "test", Everything())
        moved = Quantization(resolved, statistics()).rescaled(program)
        inputs = embeddings(), torch.arange(LENGTH)
        assert error(run(moved, "text_decoder", *inputs), run(program, "text_decoder", *inputs)) < 1e-5
        changed = [name for name in moved.methods["text_decoder"].weight_names.values() if "*" in name]
        assert len(changed) >= 4 * (3 + 1 + 2 + 1)  # q, k, v with their norm; gate and up with theirs; down with up


def test_gptq_beats_rounding_on_the_decoders_output() -> None:
    def at(scheme: str, scales: str) -> float:
        return decoder_error(made(Rule("text_decoder/layers*", (scheme,), scales=scales)))

    assert at("w4g32", "gptq") <= at("w4g32", "rtn")
    assert at("w3g32", "gptq") < 0.9 * at("w3g32", "rtn")


def test_calibrating_on_pictures_and_text_beats_text_alone() -> None:
    for scheme in ("w4g32", "w3g32"):
        rule = Rule("text_decoder/layers*", (scheme,), scales="gptq")
        mixed, text = (decoder_error(made(rule, modality=modality)) for modality in ("balanced", "text"))
        assert mixed < 0.8 * text


def test_int8_cache_decodes_step_by_step_as_it_prefills() -> None:
    program = made(kv_cache="int8")
    state = program.methods["text_decoder"].signature.state
    assert {spec.dtype for spec in state} == {torch.int8, torch.float32}
    embeds = embeddings()
    whole = run(program, "text_decoder", embeds, torch.arange(LENGTH))
    module = program.module("text_decoder")
    with torch.no_grad():
        module(embeds[:, :40], torch.arange(40))
        steps = [module(embeds[:, n : n + 1], torch.tensor([n])) for n in range(40, LENGTH)]
    assert error(torch.cat(steps, 1), whole[:, 40:]) < 1e-5
    assert 1e-5 < error(whole, run(nano()[1], "text_decoder", embeds, torch.arange(LENGTH))) < 0.02


def test_half_precision_keeps_the_integers() -> None:
    program = CastFloats(torch.float16).run(made(Rule("text_decoder/*", ("w4g32",), "linear")))
    state = program.methods["text_decoder"].exported.state_dict
    assert {t.dtype for name, t in state.items() if name.endswith("_q")} == {torch.int8}
    assert {t.dtype for name, t in state.items() if name.endswith("_scale")} == {torch.float16}


def test_a_target_without_kernels_refuses_and_names_what_it_has() -> None:
    with pytest.raises(UserError, match=r"test has no kernels for f8af8 in linear layers as text_decoder/.*w8a8"):
        made(Rule("text_decoder/*", ("f8af8",)), takes=Everything(schemes={"linear": ("w8a8",)}))
    with pytest.raises(UserError, match="keeps no int8 KV cache"):
        made(kv_cache="int8", takes=Everything(kv_cache=("float",)))


def test_groups_that_do_not_divide_fall_to_the_next_scheme() -> None:
    program = made(Rule("text_decoder/*", ("w4g128", "w4g64"), "linear"))
    state = program.methods["text_decoder"].exported.state_dict
    assert tuple(state["layers.0.self_attn.q_proj.weight_scale"].shape) == (192, 3)  # 192 = 3 x 64
    assert tuple(state["layers.0.mlp.down_proj.weight_scale"].shape) == (192, 4)  # 512 = 4 x 128
