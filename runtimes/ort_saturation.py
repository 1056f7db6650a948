"""Whether ONNX Runtime's products of uint8 by int8 are exact on this processor.

Its x86 kernels without VNNI instructions add two products in 16 bits, where they saturate. A session configured by
`WITHOUT_VNNI` multiplies uint8 by uint8 there, which is exact; with VNNI that is half as fast, for nothing.
"""

from __future__ import annotations

from functools import cache

import numpy as np

#: such entries of a session's configuration (onnxruntime_session_options_config_keys.h)
WITHOUT_VNNI = {"session.x64quantprecision": "1"}


@cache
def saturates() -> bool:
    """Whether the largest product of 64 pairs comes out wrong."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    left, right = np.full((8, 64), 255, np.uint8), np.full((64, 64), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["left", "right"], ["product"])],
        "saturation",
        [helper.make_tensor_value_info("left", TensorProto.UINT8, left.shape)],
        [helper.make_tensor_value_info("product", TensorProto.INT32, (8, 64))],
        [numpy_helper.from_array(right, "right")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=onnx.IR_VERSION_2023_5_5)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"left": left})
    return not np.array_equal(product, left.astype(np.int32) @ right.astype(np.int32))
