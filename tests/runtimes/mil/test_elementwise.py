from __future__ import annotations

import numpy as np
import torch

from tests.runtimes.mil.packages import check, mb

rng = np.random.default_rng(0)


def test_integers_divide_to_integers(tmp_path):
    x = np.array([7, -7, 12], np.float32)

    def halves(x):
        whole = mb.cast(x=x, dtype="int32")
        return mb.real_div(x=whole, y=mb.add(x=mb.mul(x=whole, y=0), y=2))

    check(tmp_path / "a.mlpackage", [(halves, lambda x: torch.tensor([3, -3, 6]))], {"x": x})


def test_functions_of_one_tensor(tmp_path):
    x = rng.uniform(-0.9, 0.9, (2, 3, 4)).astype(np.float32)
    same = (
        "abs",
        "acos",
        "asin",
        "atan",
        "atanh",
        "ceil",
        "cos",
        "cosh",
        "erf",
        "exp",
        "exp2",
        "floor",
        "round",
        "sign",
    )
    same += ("sin", "sinh", "square", "tan", "tanh")
    cases = [(lambda x, n=n: getattr(mb, n)(x=x), getattr(torch, n)) for n in same]
    cases += [
        (lambda x: mb.sqrt(x=mb.abs(x=x)), lambda x: x.abs().sqrt()),
        (lambda x: mb.log(x=mb.abs(x=x), epsilon=np.float32(1e-3)), lambda x: (x.abs() + 1e-3).log()),
        (lambda x: mb.rsqrt(x=mb.abs(x=x), epsilon=np.float32(1e-3)), lambda x: (x.abs() + 1e-3).rsqrt()),
        (lambda x: mb.inverse(x=x, epsilon=np.float32(2.0)), lambda x: 1 / (x + 2)),
        (lambda x: mb.clip(x=x, alpha=np.float32(-0.5), beta=np.float32(0.25)), lambda x: x.clip(-0.5, 0.25)),
        (lambda x: mb.threshold(x=x, alpha=np.float32(0.1)), lambda x: x.clip(min=0.1)),
        (lambda x: mb.cast(x=mb.mul(x=x, y=np.float32(9)), dtype="int32"), lambda x: (9 * x).int()),
        (lambda x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"), lambda x: x.half().float()),
        (lambda x: mb.cast(x=x, dtype="bool"), lambda x: x.bool()),
        (lambda x: mb.logical_not(x=mb.cast(x=mb.floor(x=x), dtype="bool")), lambda x: ~x.floor().bool()),
    ]
    check(tmp_path / "a.mlpackage", cases, {"x": x})


def test_functions_of_two_tensors_broadcast(tmp_path):
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    y = rng.uniform(0.5, 2, (3, 1)).astype(np.float32)
    pairs = {
        "add": torch.add,
        "sub": torch.sub,
        "mul": torch.mul,
        "real_div": torch.div,
        "floor_div": torch.floor_divide,
        "mod": torch.remainder,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "greater": torch.gt,
        "greater_equal": torch.ge,
        "less": torch.lt,
        "less_equal": torch.le,
        "equal": torch.eq,
        "not_equal": torch.ne,
    }
    cases = [(lambda x, y, n=n: getattr(mb, n)(x=x, y=y), f) for n, f in pairs.items()]
    positive = (lambda x: mb.greater(x=x, y=np.float32(0))), (lambda x: x > 0)
    cases += [
        (lambda x, y: mb.pow(x=mb.abs(x=x), y=y), lambda x, y: x.abs() ** y),
        (
            lambda x, y: mb.select(cond=positive[0](x), a=x, b=mb.mul(x=x, y=y)),
            lambda x, y: torch.where(positive[1](x), x, x * y),
        ),
    ]
    for name in ("logical_and", "logical_or", "logical_xor"):
        cases.append(
            (
                lambda x, y, n=name: getattr(mb, n)(x=mb.greater(x=x, y=np.float32(0)), y=mb.less(x=x, y=y)),
                lambda x, y, n=name: getattr(torch, n)(x > 0, x < y),
            )
        )
    check(tmp_path / "a.mlpackage", cases, {"x": x, "y": y})


def test_whole_numbers_divide_downwards(tmp_path):
    x, y = np.array([-7, 7, -1], np.int32), np.array([2, -2, 3], np.int32)
    cases = [
        (lambda x, y: mb.floor_div(x=x, y=y), torch.floor_divide),
        (lambda x, y: mb.mod(x=x, y=y), torch.remainder),
        (lambda x, y: mb.cast(x=mb.cast(x=mb.mul(x=x, y=np.int32(10000)), dtype="int16"), dtype="int32"),
         lambda x, y: (x * 10000).to(torch.int16).int()),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": x, "y": y})


def test_quantize_and_dequantize(tmp_path):
    x = rng.uniform(-3, 3, (4, 5)).astype(np.float32)
    scale = np.array([0.01, 0.02, 0.03, 0.04], np.float32)

    def reference(x):
        zero = torch.full((4,), 3, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(x, torch.from_numpy(scale), zero, 0, -128, 127)

    def build(x):
        zero = np.full(4, 3, np.int8)
        small = mb.quantize(input=x, zero_point=zero, scale=scale, axis=0, output_dtype="int8")
        return mb.dequantize(input=small, zero_point=zero, scale=scale, axis=0)

    check(tmp_path / "a.mlpackage", [(build, reference)], {"x": x}, 1e-4)
