"""The common call of the weight algorithms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from quant.algorithms.base import QuantizedWeight
from quant.algorithms.inputs import Inputs
from quant.scheme import WeightScheme

#: weight [O, K], its scheme and what is known of its inputs to the quantized weight
Quantizer = Callable[[Tensor, WeightScheme, Inputs | None], QuantizedWeight]

#: weights [O, K] that read one input, their scheme and what is known of it to factors [K]: W * s and x / s
Rescaling = Callable[[Sequence[Tensor], WeightScheme, Inputs], Tensor]
