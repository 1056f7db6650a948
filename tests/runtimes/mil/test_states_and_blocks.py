from __future__ import annotations

import numpy as np
import pytest

from runtimes.mil.registry import MilError
from tests.runtimes.mil.packages import mb, save, types


def test_a_state_lives_from_call_to_call_until_it_is_reset(tmp_path):
    inputs = {"total": mb.StateTensorSpec((3,), types.fp16), "x": mb.TensorSpec((3,), types.fp16)}

    def body(total, x):
        before = mb.read_state(input=total)
        return mb.coreml_update_state(state=total, value=mb.add(x=before, y=x))

    model = save(tmp_path / "a.mlpackage", inputs, body)
    x = np.array([1, 2, 3], np.float16)
    assert [next(iter(model({"x": x}).values())).tolist() for _ in range(2)] == [[1, 2, 3], [2, 4, 6]]
    assert model.states["total"].value.tolist() == [2, 4, 6]
    model.reset()
    assert next(iter(model({"x": x}).values())).tolist() == [1, 2, 3]


def test_branches_read_what_is_around_them(tmp_path):
    def body(x):
        positive = mb.cast(x=mb.greater(x=mb.squeeze(x=x, axes=[0]), y=np.float32(0)), dtype="bool")
        doubled = mb.mul(x=x, y=np.float32(2))
        return mb.cond(
            pred=positive, _true_fn=lambda: mb.add(x=doubled, y=np.float32(1)), _false_fn=lambda: mb.sub(x=x, y=doubled)
        )

    model = save(tmp_path / "a.mlpackage", {"x": mb.TensorSpec((1,), types.fp32)}, body)
    assert [next(iter(model({"x": np.array([v], np.float32)}).values())).item() for v in (3, -3)] == [7, 3]


def test_loops_carry_values(tmp_path):
    def body(x):
        start = mb.fill(shape=[1], value=np.float32(0))
        return mb.while_loop(
            _cond=lambda i, y: mb.squeeze(x=mb.less(x=i, y=np.float32(5)), axes=[0]),
            _body=lambda i, y: (mb.add(x=i, y=np.float32(1)), mb.mul(x=y, y=np.float32(2))),
            loop_vars=(start, x),
        )

    model = save(tmp_path / "a.mlpackage", {"x": mb.TensorSpec((1,), types.fp32)}, body)
    count, value = model({"x": np.array([3], np.float32)}).values()
    assert (float(count[0]), float(value[0])) == (5, 96)


def test_inputs_that_the_program_does_not_take_are_refused(tmp_path):
    model = save(tmp_path / "a.mlpackage", {"x": mb.TensorSpec((2,), types.int32)}, lambda x: mb.add(x=x, y=1))
    assert next(iter(model({"x": np.array([1, 2])}).values())).tolist() == [2, 3]
    for wrong, why in (
        ({"x": np.zeros(3, np.int32)}, r"takes shape \[2\], got \[3\]"),
        ({"y": np.zeros(2, np.int32)}, r"takes \['x'\], got \['y'\]"),
        ({"x": np.array([1, 2**40])}, "values that INT32 cannot hold"),
    ):
        with pytest.raises(MilError, match=why):
            model(wrong)
