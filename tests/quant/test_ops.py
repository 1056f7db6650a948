"""The operators against their definitions, written out element by element."""

import torch

from quant.ops import FLOAT8


def test_dequantize_blocks_with_zero_points() -> None:
    q = torch.tensor([[1, -2, 3, 4], [0, 7, -8, 5]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    zero = torch.tensor([[1, 0], [-3, 2]], dtype=torch.int8)
    expected = [[0.0, -1.5, 6.0, 8.0], [3.0, 10.0, -2.5, 0.75]]
    assert torch.ops.vlmx.dequantize(q, scale, zero, 4, 2).tolist() == expected
    half = torch.ops.vlmx.dequantize(q, scale.half(), None, 4, 2)
    assert half.dtype == torch.float16
    assert half[0].tolist() == [0.5, -1.0, 6.0, 8.0]


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    x = torch.tensor([0.5, 1.5, -0.5, 2.5, 300.0, -300.0])
    q = torch.ops.vlmx.quantize(x, torch.tensor(1.0), None, torch.int8)
    assert q.tolist() == [0, 2, 0, 2, 127, -128]
    shifted = torch.ops.vlmx.quantize(x, torch.tensor(1.0), torch.tensor(5, dtype=torch.int8), torch.int8)
    assert shifted.tolist() == [5, 7, 5, 7, 127, -128]
    eight = torch.ops.vlmx.quantize(torch.tensor([1000.0, 17.0]), torch.tensor(1.0), None, FLOAT8)
    assert eight.float().tolist() == [448.0, 16.0]  # three bits of mantissa


def test_per_token_covers_every_row_and_zero() -> None:
    x = torch.tensor([[1.0, 3.0, 2.0], [-4.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    q, scale, zero = torch.ops.vlmx.quantize_per_token(x)
    assert (q.shape, scale.shape, zero.shape) == (x.shape, (3, 1), (3, 1))
    back = torch.ops.vlmx.dequantize(q, scale, zero, 8, 0)
    assert scale[0].item() == torch.tensor(3.0 / 255).item()
    assert ((back - x).abs() <= scale / 2 + 1e-6).all()
    assert back[2].tolist() == [0.0, 0.0, 0.0]


def test_per_block_puts_the_largest_at_127() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    q, scale = torch.ops.vlmx.quantize_per_block(x, 4)
    assert scale.shape == (2, 3, 2)
    assert (q.unflatten(-1, (2, 4)).abs().amax(-1) == 127).all()
    back = torch.ops.vlmx.dequantize(q, scale, None, 8, 4)
    assert ((back - x).abs() <= scale.repeat_interleave(4, -1) / 2 + 1e-6).all()


def test_palette_looks_up_by_group_of_rows() -> None:
    index = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0]], dtype=torch.uint8)
    table = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    assert torch.ops.vlmx.palette(index, table, 1).tolist() == [[1.0, 2.0], [2.0, 2.0], [10.0, 10.0], [20.0, 10.0]]
