"""The first rows of tables and heads compute what they computed among all."""

from __future__ import annotations

import torch
from torch import nn

from graphs.model import Request, load_model
from graphs.narrow import narrow
from graphs.program import Signature
from graphs.spec import TensorSpec
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from tests.tiny import toy_program


def test_ids_and_logits_are_of_the_first_words() -> None:
    model = load_model(Request("mobilevlm"))
    program = trace(model.architecture, model.weights)
    small = narrow(program, 64)
    small.check()
    assert small.methods["vision_encoder"] is program.methods["vision_encoder"]
    assert small.methods["token_embedding"].signature.inputs[0].high == 64
    assert small.methods["text_decoder"].signature.outputs[0].shape[-1] == 64
    assert small.methods["text_decoder"].signature.state == program.methods["text_decoder"].signature.state
    for method, width in (("token_embedding", 192), ("text_decoder", 64)):
        runtimes = EagerRuntime(small), EagerRuntime(program)
        for call in small.methods[method].signature.method(method).examples(seed=2):
            arrays = [tensor.numpy() for tensor in call]
            (mine,), (whole,) = (runtime.call(method, arrays) for runtime in runtimes)
            assert mine.shape[-1] == width
            assert torch.allclose(torch.from_numpy(mine), torch.from_numpy(whole[..., :width]), atol=1e-5)


def test_what_is_narrow_already_stays() -> None:
    model = load_model(Request("mobilevlm"))
    program = trace(model.architecture, model.weights)
    assert narrow(program, 491) is program
    shapes = {n: tuple(t.shape) for n, t in narrow(program, 64).methods["text_decoder"].exported.state_dict.items()}
    assert shapes["lm_head.weight"] == (64, 192)
    assert shapes["layers.0.mlp.up_proj.weight"][0] > 64
    assert isinstance(program.methods["text_decoder"].exported.state_dict["lm_head.weight"], nn.Parameter)


class Projector(nn.Module):
    """Two layers, the second as wide as the first, as between a tower and a decoder of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(8, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear_2(nn.functional.gelu(self.linear_1(x)))) * 30


def test_a_layer_that_another_reads_is_no_head() -> None:
    x = TensorSpec("x", (1, 3, 8))
    program = toy_program("net", Projector, Signature((x,), (TensorSpec("y", (1, 3, 64)),)))
    small = narrow(program, 16)
    shapes = {name: tuple(t.shape) for name, t in small.methods["net"].exported.state_dict.items()}
    assert shapes["linear_1.weight"] == (64, 8)
    assert shapes["linear_2.weight"] == (16, 64)
    given = [torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0)).numpy()]
    (mine,), (whole,) = (EagerRuntime(p).call("net", given) for p in (small, program))
    assert torch.allclose(torch.from_numpy(mine), torch.from_numpy(whole[..., :16]), atol=1e-5)


class Reshaping(nn.Module):
    """A projector behind whose last layer the width is written out, as where pictures become one row of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).view(1, -1, 64)


def test_a_layer_whose_width_is_written_out_behind_it_stays() -> None:
    x = TensorSpec("x", (1, 3, 8))
    program = toy_program("net", Reshaping, Signature((x,), (TensorSpec("y", (1, 3, 64)),)))
    assert narrow(program, 16) is program
