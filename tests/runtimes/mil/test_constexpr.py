from __future__ import annotations

import numpy as np
import torch
from coremltools.converters.mil.mil.types import type_mapping

from runtimes.mil.dtypes import DTYPES
from tests.runtimes.mil.packages import check, mb, types

rng = np.random.default_rng(9)


def small(values: np.ndarray, kind: str) -> np.ndarray:
    """`values` in one of coremltools' types narrower than a byte."""
    return values.astype(type_mapping.nptype_from_builtin(getattr(types, kind)))


def test_scales_by_block_of_four_and_eight_bits(tmp_path):
    scale = rng.uniform(0.5, 1, (4, 2)).astype(np.float32)
    data8, data4 = rng.integers(-128, 128, (8, 6)).astype(np.int8), rng.integers(-8, 8, (8, 6))
    offset = rng.integers(-8, 8, (4, 2))
    unsigned = rng.integers(0, 16, (8, 6))
    wide = torch.from_numpy(np.repeat(np.repeat(scale, 2, 0), 3, 1))
    shift = torch.from_numpy(np.repeat(np.repeat(offset, 2, 0), 3, 1))
    cases = [
        (lambda x: mb.constexpr_blockwise_shift_scale(data=data8, scale=scale),
         lambda x: torch.from_numpy(data8) * wide),
        (lambda x: mb.constexpr_blockwise_shift_scale(
            data=small(data4, "int4"), scale=scale, offset=small(offset, "int4")),
         lambda x: (torch.from_numpy(data4) - shift) * wide),
        (lambda x: mb.constexpr_blockwise_shift_scale(data=small(unsigned, "uint4"), scale=scale),
         lambda x: torch.from_numpy(unsigned) * wide),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": np.zeros(1, np.float32)})


def test_lookup_tables_of_every_width(tmp_path):
    def case(bits: int):
        indices = rng.integers(0, 2**bits, (6, 8))
        lut = rng.standard_normal((2, 1, 2**bits, 1)).astype(np.float32)
        expected = torch.from_numpy(np.stack([lut[row // 3, 0, indices[row], 0] for row in range(6)]))
        return (
            lambda x: mb.constexpr_lut_to_dense(indices=small(indices, f"uint{bits}"), lut=lut),
            lambda x: expected,
        )

    check(tmp_path / "a.mlpackage", [case(bits) for bits in (1, 2, 3, 4, 6, 8)], {"x": np.zeros(1, np.float32)})


def test_tables_of_vectors_and_sparse_weights(tmp_path):
    indices, lut = rng.integers(0, 4, (3, 4)), rng.standard_normal((1, 1, 4, 2)).astype(np.float32)
    dense = np.where(rng.random((4, 5)) > 0.5, rng.standard_normal((4, 5)), 0).astype(np.float32)
    cases = [
        (lambda x: mb.constexpr_lut_to_dense(indices=small(indices, "uint2"), lut=lut, vector_axis=np.int32(0)),
         lambda x: torch.from_numpy(lut[0, 0][indices]).permute(0, 2, 1).reshape(6, 4)),
        (lambda x: mb.constexpr_sparse_to_dense(nonzero_data=dense[dense != 0], mask=small(dense != 0, "uint1")),
         lambda x: torch.from_numpy(dense)),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": np.zeros(1, np.float32)})


def test_negative_four_bit_numbers_decode():
    assert list(DTYPES["INT4"].decode(bytes([0x8F, 0x70]), (4,))) == [-1, -8, 0, 7]
    assert list(DTYPES["UINT3"].decode(bytes([0b10_001_000, 0b0_011_010_0]), (4,))) == [0, 1, 2, 2]
