"""How one layer's weights and activations are kept: schemes with a text form, `w4g32a8t`.

Weights: `w8`, `w4`, `w3` are symmetric integers with one scale an output channel; `g32` and the like give one to every
32 inputs; `z` adds zero points. `f8` is float8 e4m3; `p8`, `p6`, `p4` index a palette. Activations, as a suffix: `a8`
static int8 inputs, `a8o` static int8 inputs and outputs, `a8t` dynamic int8 with a scale a token, `a8b` dynamic int8 in
blocks of the weights' group, `af8` static float8 inputs; without a suffix they stay floats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graphs.errors import UserError
from graphs.files import shown

Activations = Literal["", "a8", "a8o", "a8t", "a8b", "af8"]

FORM = re.compile(r"(?P<kind>[wfp])(?P<bits>\d)(?:g(?P<group>\d{1,4}))?(?P<zero>z)?(?P<activations>af8|a8[otb]?)?")
KINDS: dict[str, Literal["int", "float8", "palette"]] = {"w": "int", "f": "float8", "p": "palette"}
BITS = {"w": (3, 4, 8), "f": (8,), "p": (4, 6, 8)}
GROUPS = (0, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class WeightScheme:
    """Weights [O, K]: `group` 0 is one scale an output channel, else one to every so many inputs."""

    kind: Literal["int", "float8", "palette"]
    bits: int
    group: int = 0
    asymmetric: bool = False

    def bytes(self, shape: Sequence[int], scale_bytes: int) -> int:
        """What weights of that shape take: packed codes, and scales, zero points or a palette of `scale_bytes` each."""
        count = math.prod(shape)
        codes = -(-count * self.bits // 8)
        if self.kind == "palette":
            return codes + scale_bytes * 2**self.bits
        scales = count // self.group if self.group else shape[0]
        return codes + scales * (scale_bytes + self.asymmetric)


@dataclass(frozen=True)
class Scheme:
    """Weights and what the layer reads (and, for `a8o`, gives)."""

    weights: WeightScheme
    activations: Activations = ""

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme that `text` writes. Raises UserError."""
        match = FORM.fullmatch(text)
        if match is None:
            raise UserError(f"'{shown(text)}' is no scheme: write it as in w8a8, w4g32, w4g32a8t, f8af8 or p4")
        kind, bits, group = match["kind"], int(match["bits"]), int(match["group"] or 0)
        if bits not in BITS[kind]:
            choices = ", ".join(f"{kind}{n}" for n in BITS[kind])
            raise UserError(f"scheme '{text}': {bits} bits are not among {choices}")
        if group not in GROUPS or (kind != "w" and (group or match["zero"])):
            raise UserError(f"scheme '{text}': groups are {', '.join(map(str, GROUPS[1:]))}, of integer weights only")
        activations: Activations = match["activations"] or ""  # type: ignore[assignment]
        if activations == "a8b" and not group:
            raise UserError(f"scheme '{text}': a8b needs a group for its blocks, as in w4g32a8b")
        if (activations == "af8") != (kind == "f" and bool(activations)):
            raise UserError(f"scheme '{text}': float8 activations go with float8 weights, as in f8af8")
        return cls(WeightScheme(KINDS[kind], bits, group, bool(match["zero"])), activations)

    def __str__(self) -> str:
        weights = self.weights
        letter = next(key for key, kind in KINDS.items() if kind == weights.kind)
        group = f"g{weights.group}" if weights.group else ""
        return f"{letter}{weights.bits}{group}{'z' if weights.asymmetric else ''}{self.activations}"

    @property
    def bfloat16_scales(self) -> bool:
        """Whether the weights' scales are kept in bfloat16: XNNPACK's kernels of 4-bit groups have no others."""
        return self.activations == "a8t" and self.weights.bits == 4 and self.weights.group > 0

    def bytes(self, shape: Sequence[int], float_bytes: int) -> int:
        """What a layer's weights take where other numbers take `float_bytes` each."""
        return self.weights.bytes(shape, 2 if self.bfloat16_scales else float_bytes)

    @property
    def needs_ranges(self) -> bool:
        """Whether scales of activations are fixed at compile time, from calibration."""
        return self.activations in ("a8", "a8o", "af8")
