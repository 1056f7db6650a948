"""The GPU's page from rows: tables, ratios, errors and reasons."""

from __future__ import annotations

from typing import Any

from export.gpu.page import page
from tests.export.gpu.test_bench import MACHINE

TIMES = {"vision_ms": 2.0, "prefill_ms": 4.0, "decode_ms": 1.0, "memory_bytes": 3 << 20, "load_s": 1.0}
EAGER: dict[str, Any] = {
    "by": "torch eager",
    "size": "big",
    "numbers": "fp16",
    "version": "torch 2.11 on cuda",
    **TIMES,
}
OURS: dict[str, Any] = {
    "by": "tensorrt-rtx",
    "size": "big",
    "numbers": "int8",
    "built": "on this machine",
    "version": "TensorRT-RTX 1.7 on a GPU",
    **TIMES,
    "decode_ms": 0.25,
    "file_bytes": 5 << 20,
    "first_token_ms": 9.0,
    "lower": {
        "vision_encoder": {"executed": True, "relative_l2": 1.5e-3, "limit": 1e-2},
        "text_decoder": {"executed": False, "why": "no GPU"},
    },
    "against_eager": {"vision_encoder": {"relative_l2": 2e-2, "sqnr_db": 34.0}},
}


def test_numbers_ratios_and_errors() -> None:
    told = page({"machine": MACHINE, "notes": ["ranges of two samples"], "rows": [OURS, EAGER]})
    assert "a GPU, compute capability 9.0, 8 GiB, driver 580.1 (CUDA 13.0)" in told
    assert "torch 2.13.0" in told
    assert "tensorrt-cu13" not in told
    assert "\nranges of two samples.\n" in told
    (ours,) = (line for line in told.splitlines() if line.startswith("| TensorRT-RTX 1.7 |"))
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells[1:5] == ["int8", "2.00", "4.00", "0.250"]
    assert cells[-1] == "1.00, 1.00, 4.00"
    (eager,) = (line for line in told.splitlines() if line.startswith("| torch eager |"))
    assert eager.rstrip().endswith("| - |")
    assert "vision_encoder 1.5e-03 of 1.0e-02; text_decoder not executed: no GPU" in told
    assert "against torch eager in fp16 on this GPU: vision_encoder 2.0e-02" in told


def test_reasons_take_the_place_of_numbers() -> None:
    failed = {"by": "tensorrt-rtx", "size": "small", "numbers": "fp8", "failed": "export: no kernels"}
    wrong = {**OURS, "size": "small", "wrong": "text_decoder is off", "lower": {}}
    told = page({"machine": {**MACHINE, "driver": None}, "notes": [], "rows": [wrong, failed]})
    assert "- tensorrt-rtx, fp8: no numbers. export: no kernels" in told
    assert "WRONG: text_decoder is off" in told
    assert "driver unknown" in told
    assert told.count("## small") == 1
    assert told.endswith("\n")
    assert not told.endswith("\n\n")
