"""VisualBERT and its heads from checkpoints that transformers' classes wrote: the same states and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    VisualBertConfig,
    VisualBertForMultipleChoice,
    VisualBertForPreTraining,
    VisualBertForQuestionAnswering,
    VisualBertForRegionToPhraseAlignment,
    VisualBertForVisualReasoning,
    VisualBertModel,
)

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.architectures.visualbert import VisualBert
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.picture import Array
from graphs.preprocess.regions import region_inputs
from graphs.trace import trace
from runtimes.eager import EagerRuntime
from runtimes.manifest import Bundle
from runtimes.session import open_runtime
from tests.lowered import lowers
from tests.numbers import relative_l2
from tests.pretrained import randomized, save
from tests.published import counted

CONFIG: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
    "visual_embedding_dim": 20,
    "pad_token_id": 0,
}
CLASSES: dict[str, Any] = {
    "encode": VisualBertModel,
    "pretrain": VisualBertForPreTraining,
    "choose": VisualBertForMultipleChoice,
    "answer": VisualBertForQuestionAnswering,
    "reason": VisualBertForVisualReasoning,
    "align": VisualBertForRegionToPhraseAlignment,
}
CASES: dict[str, dict[str, Any]] = {
    "published shape": {},
    "odd": {
        "hidden_size": 50,
        "num_attention_heads": 5,
        "type_vocab_size": 3,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-3,
        "num_labels": 7,
        "special_visual_initialize": False,
    },
}
RESULTS = ("last_hidden_state", "pooler_output", "prediction_logits", "seq_relationship_logits", "logits")


Sample = tuple[tuple[Array, ...], dict[str, torch.Tensor]]


def samples() -> list[Sample]:
    """Texts and regions of several sizes, types and words of regions given or left out: for us, for theirs."""
    generator = np.random.default_rng(0)
    few, some, many = (generator.standard_normal((count, 20)).astype(np.float32) for count in (1, 5, 11))
    words = [[1], [], [2, 3, 0], [4, 4], []]
    padded = torch.tensor([[row + [-1] * (3 - len(row)) for row in words]])
    return [
        (region_inputs([5, 9], few, 40), {}),
        (
            region_inputs([7, 30, 41, 2, 9, 9], some, 40, [0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1], words),
            {"image_text_alignment": padded},
        ),
        (region_inputs(list(range(40)), many, 40), {}),
    ]


def expected(made: Any, sample: Sample, *others: Array) -> list[torch.Tensor]:
    """What transformers' class gives, in the order of our outputs."""
    ids, types, features, region_types = map(torch.from_numpy, sample[0][:4])
    given = {
        "input_ids": ids,
        "token_type_ids": types,
        "attention_mask": torch.ones_like(ids),
        "visual_embeds": features,
        "visual_token_type_ids": region_types,
        "visual_attention_mask": torch.ones_like(region_types),
    }
    if isinstance(made, VisualBertForMultipleChoice):
        given = {name: tensor[:, None] for name, tensor in given.items()}
    given |= sample[1]
    if others:
        given["region_to_phrase_position"] = torch.from_numpy(others[0])
    with torch.no_grad():
        found = made(**given)
    return [found[name] for name in RESULTS if name in found]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("task", CLASSES)
def test_equals_transformers(task: str, case: str, tmp_path: Path) -> None:
    made = randomized(CLASSES[task](VisualBertConfig(**{**CONFIG, **CASES[case]})))
    model = load_model(Request("visualbert", checkpoint=str(save(made, tmp_path))))
    assert isinstance(model.architecture, VisualBert)
    assert model.architecture.task == task
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    others = (np.array([[1, -1, 0, 2]]),) if task == "align" else ()
    for sample in samples():
        found = [torch.from_numpy(array) for array in runtime.call("fusion_encoder", [*sample[0], *others])]
        wanted = expected(made, sample, *others)
        assert len(found) == len(wanted) == (2 if task in ("encode", "pretrain") else 1)
        for one, other in zip(found, wanted, strict=True):
            assert relative_l2(one, other) <= 1e-5


def test_regions_that_bypass_the_layers(tmp_path: Path) -> None:
    """transformers' own forward fails in this mode, behind its last layer; so its modules are called one by one."""
    made = randomized(VisualBertModel(VisualBertConfig(**CONFIG, bypass_transformer=True)))
    model = load_model(Request("visualbert", checkpoint=str(save(made, tmp_path))))
    runtime = EagerRuntime(trace(model.architecture, model.weights))
    for inputs, known in samples():
        ids, types, features, region_types = map(torch.from_numpy, inputs[:4])
        with torch.no_grad():
            embeds = made.embeddings(ids, types, visual_embeds=features, visual_token_type_ids=region_types, **known)
            text = made.encoder(embeds[:, : ids.shape[1]])[0]
            states = made.additional_layer(torch.cat([text, embeds[:, ids.shape[1] :]], dim=1))[0]
        found, pooled = (torch.from_numpy(array) for array in runtime.call("fusion_encoder", inputs))
        assert relative_l2(found, states) <= 1e-5
        assert relative_l2(pooled, made.pooler(states)) <= 1e-5


def test_the_layout_of_the_hub_repeats_what_is_tied(tmp_path: Path) -> None:
    made = randomized(VisualBertForPreTraining(VisualBertConfig(**CONFIG)))
    save(made, tmp_path / "a")
    made.save_pretrained(tmp_path / "b")
    tensors = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    tensors["visual_bert.embeddings.position_ids"] = torch.arange(40)[None]
    assert len(tensors) > len(load_file(tmp_path / "b" / "model.safetensors"))
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    one, other = (load_model(Request("visualbert", checkpoint=str(tmp_path / name))) for name in "ab")
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_bundles_score_as_transformers_does(tmp_path: Path) -> None:
    made = randomized(VisualBertForQuestionAnswering(VisualBertConfig(**CONFIG, num_labels=9)))
    request = Request("visualbert", checkpoint=str(save(made, tmp_path / "made")))
    bundle = Bundle.open(export(ExportOptions(request, "onnxruntime", "reference-fp32", out=tmp_path / "b"), silent))
    assert bundle.manifest["prompt"]["template"] is None
    assert bundle.manifest["prompt"]["labels"] == 9
    runtime = open_runtime(bundle)
    for sample in samples():
        (logits,) = runtime.call("fusion_encoder", sample[0])
        assert relative_l2(torch.from_numpy(logits), expected(made, sample)[0]) <= 1e-4


def test_tiny_lowers(tmp_path: Path) -> None:
    manifest = lowers(Request("visualbert", "tiny"), "onnxruntime", tmp_path / "b")
    assert set(manifest["methods"]) == {"fusion_encoder"}


def test_published_sizes_count() -> None:
    counted(VisualBert)


def test_absent_keys_are_transformers_defaults() -> None:
    found, expected = VisualBert.from_config({}), VisualBertConfig()
    assert (found.features, found.types) == (expected.visual_embedding_dim, expected.type_vocab_size)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps"):
        assert getattr(found.text, key) == getattr(expected, key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["VisualBertForVQA"]}, "architectures names VisualBertForVQA"),
        ({"num_attention_heads": 7}, "hidden_size 768 is not a multiple of num_attention_heads 7"),
        ({"visual_embedding_dim": -1}, "visual_embedding_dim is -1"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        VisualBert.from_config(change)
