"""Algorithms that choose the numbers of a quantized weight: pure functions of tensors, by name."""

from __future__ import annotations

from quant.algorithms import awq, gptq, mse, rtn, smoothquant
from quant.algorithms.quantizer import Quantizer, Rescaling

#: name -> weight [O, K], scheme, inputs -> QuantizedWeight
ALGORITHMS: dict[str, Quantizer] = {
    "rtn": rtn.quantize,
    "mse": mse.quantize,
    "clip": awq.clip,
    "gptq": gptq.quantize,
}

#: name -> weights that read one input, scheme, inputs -> factors [K]; quantize W * s and divide the input by s
RESCALINGS: dict[str, Rescaling] = {"awq": awq.rescale, "smoothquant": smoothquant.rescale}
