"""What `make matrix` runs for a row, and how the page tells what is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from export import matrix
from export.matrix_jobs import THOROUGH, Job, jobs
from export.matrix_page import DEVICE, agrees, ladder, page
from graphs.compress.passes.prune import RULES
from quant.recipe import names


def export_row(target: str, passes: str = "", **found: Any) -> dict[str, Any]:
    job = Job("export", "clip", "tiny", target, passes, "mobile-balanced" if passes else "")
    return {"key": job.key, **vars(job), "recipe": job.recipe or "reference-fp32", **found}


def cells(rows: list[dict[str, Any]]) -> dict[str, str]:
    head, _, line = ladder(rows)
    names_, values = ([cell.strip() for cell in text.strip("|").split("|")] for text in (head, line))
    return dict(zip(names_, values, strict=True))


def test_thorough_rows_go_through_every_recipe_and_pass_on_every_target() -> None:
    request = THOROUGH[0]
    found = list(jobs([request.model], [str(request.variant)]))
    assert len({job.key for job in found}) == len(found)
    for target in ("coreml", "executorch", "onnxruntime", "tensorrt"):
        mine = [job for job in found if job.target == target and job.kind == "export"]
        assert {job.recipe for job in mine if not job.passes} == {"", *names()}
        assert len({job.passes for job in mine} - {""}) == 6 + len(RULES)
        together = {job.recipe for job in mine if job.passes and job.recipe}
        assert together == {name for name in names() if not name.startswith("reference")}


def test_published_counts_are_met_as_far_as_they_are_told() -> None:
    assert agrees(1_674_121_216, 1_700_000_000)  # told as 1.7 B
    assert not agrees(1_640_000_000, 1_700_000_000)
    assert agrees(3_033_981_696, 3_000_000_000)
    assert not agrees(3_060_000_000, 3_000_000_000)
    assert agrees(151_277_313, 151_277_313)
    assert not agrees(149_000_000, 151_277_313)


def test_other_rows_are_published_compared_and_lowered() -> None:
    found = list(jobs(["clip"], None))
    kinds = [job.kind for job in found]
    assert kinds == ["published"] * 4 + ["plan"] * 4 + ["equality"] + ["answers"] * 2 + ["export"] * 8
    assert [job.target for job in found if job.kind == "answers"] == ["onnxruntime", "executorch"]


def test_decoders_are_quantized_too_and_pruned_where_their_tokens_can_be() -> None:
    def quantized(model: str, variant: str) -> set[str]:
        return {job.passes for job in jobs([model], [variant]) if job.recipe == "mobile-balanced"}

    assert quantized("paligemma", "tiny") == {"prune{keep=18,method=divprune}"}
    assert quantized("qwen2_vl", "tiny") == {"thin{factor=2}"}
    assert quantized("llama3_2_vision", "tiny") == {""}
    assert quantized("aimv2", "tiny") == {""}


def test_a_published_size_is_counted_and_traced() -> None:
    row = Job("published", "clip", "clip-vit-b-32").run()
    assert row["parameters"] == 151_277_313
    assert row["methods"] == 3


def test_a_published_size_is_planned() -> None:
    row = Job("plan", "clip", "clip-vit-b-32").run()
    assert row["weight_bytes"] == 2 * 151_277_313
    assert row["kv_cache_bytes"] == 0
    assert {"image_encoder", "text_encoder", "similarity"} <= row["milliseconds"]["iphone-15-pro"].keys()
    assert "failed" not in row


def test_rungs_are_yes_some_or_blank() -> None:
    lower = {"image_encoder": {"executed": True, "relative_l2": 1e-7}}
    rows = [
        {"kind": "published", "model": "clip", "parameters": 995, "catalogue": 1000, "methods": 3},
        {"kind": "published", "model": "clip", "parameters": 97, "catalogue": 101, "methods": 3},
        {"kind": "equality", "model": "clip", "refused": "no test compares it"},
        export_row("onnxruntime", lower=lower),
        export_row("executorch", failed="off by 3"),
        export_row("onnxruntime", "pool{factor=2}", refused="no grid"),
        {**vars(Job("answers", "clip", "tiny", "executorch")), "answers": []},
        {**vars(Job("answers", "clip", "tiny-b", "executorch")), "answers": [], "failed": "token 3 is 5"},
        {"kind": "plan", "model": "clip", "milliseconds": {}},
    ]
    found = cells(rows)
    assert (found["L1"], found["L2"], found["L3"]) == ("1 of 2", "yes", "")
    assert (found["L4 onnxruntime"], found["L4 executorch"], found["L4 coreml"]) == ("yes", "0 of 1", "")
    assert found["L5 onnxruntime"] == ""
    assert (found["answers onnxruntime"], found["answers executorch"], found["plan"]) == ("", "1 of 2", "yes")


def test_rows_of_other_models_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**vars(Job("equality", "clip")), "key": Job("equality", "clip").key, "failed": "broken"}
    (tmp_path / "matrix.json").write_text(json.dumps([other]))
    monkeypatch.setattr(matrix, "attempt", lambda job: {"key": job.key, **vars(job), "refused": "not asked for"})
    arguments = ["--models", "blip", "--kinds", "equality", "--out", str(tmp_path), "--resume", "--workers", "1"]
    monkeypatch.setattr("sys.argv", ["matrix", *arguments])
    assert matrix.main() == 1
    assert [row["model"] for row in json.loads((tmp_path / "matrix.json").read_text())] == ["blip", "clip"]


def test_results_are_kept_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def attempt(job: Job) -> dict[str, Any]:
        asked.append(job.key)
        why = {"failed": "broken"} if job.kind == "equality" and len(asked) < 5 else {"refused": "not asked for"}
        found = {
            "published": {"parameters": 100, "catalogue": 100, "methods": 1, "seconds": 1.0},
            "plan": {"weight_bytes": 200, "kv_cache_bytes": 0, "milliseconds": {DEVICE: {}}},
        }
        return {"key": job.key, **vars(job), **found.get(job.kind, why)}

    monkeypatch.setattr(matrix, "attempt", attempt)
    arguments = ["--models", "siglip", "--out", str(tmp_path), "--resume", "--workers", "1"]
    monkeypatch.setattr("sys.argv", ["matrix", *arguments])
    failed = matrix.main()
    first = len(asked)
    rows = json.loads((tmp_path / "matrix.json").read_text())
    assert [row["key"] for row in rows] == asked
    assert matrix.main() == 0
    assert len(asked) == first + failed
    assert "siglip" in (tmp_path / "matrix.md").read_text()
    monkeypatch.setattr("sys.argv", ["matrix", "--models", "clip", "--out", str(tmp_path), "--resume"])
    assert matrix.main() == 0
    both = json.loads((tmp_path / "matrix.json").read_text())
    assert [row["key"] for row in both if row["model"] == "siglip"] == [row["key"] for row in rows]
    assert both[0]["model"] == "clip"


def test_the_page_counts_and_names_reasons() -> None:
    text = page([export_row("coreml", refused="takes no bfloat16"), export_row("tensorrt", failed="off")], "make", 3)
    assert "2 exports: 0 written, 1 refused by name, 1 failed; 3 jobs were not run" in text
    assert "refused: takes no bfloat16" in text
    assert "FAILED: off" in text


def test_the_page_tells_answers_and_plans() -> None:
    said = {"prompt": "a picture", "tokens": [1, 2], "relative_l2": 4e-7}
    plan = {"weight_bytes": 2**21, "kv_cache_bytes": 2**20, "milliseconds": {DEVICE: {"text_decoder (one token)": 2.5}}}
    rows = [
        {
            **vars(Job("answers", "aria", "tiny", "onnxruntime")),
            "answers": [said, {"prompt": "no picture", "refused": "a picture is needed"}],
            "seconds": 9.0,
        },
        {**vars(Job("answers", "aria", "tiny", "executorch")), "failed": "a picture: token 3 is 5, not 7"},
        {**vars(Job("plan", "aria", "aria-25b")), **plan},
    ]
    text = page(rows, "make", 0)
    assert "| a picture: the same 4.0e-07; no picture: not taken (a picture is needed) | 9 |" in text
    assert "| FAILED: a picture: token 3 is 5, not 7 | |" in text
    assert "| aria | aria-25b | 2.0 | 1.0 | text_decoder (one token) 2.5 |" in text
