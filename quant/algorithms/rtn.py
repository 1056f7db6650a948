"""Round to nearest, on the grid that just covers every block."""

from __future__ import annotations

from torch import Tensor

from quant.algorithms.base import QuantizedWeight, blocks, by_rows, least_scale, round_blocks
from quant.algorithms.inputs import Inputs
from quant.scheme import WeightScheme


def quantize(weight_OK: Tensor, scheme: WeightScheme, inputs: Inputs | None = None) -> QuantizedWeight:
    """The weight rounded to nearest; `inputs` are not read. Raises UserError where the group does not divide K."""

    def rows(some_OK: Tensor) -> QuantizedWeight:
        whole = blocks(some_OK, scheme.group)
        return round_blocks(whole, *least_scale(whole, scheme), scheme)

    return by_rows(weight_OK, rows)
