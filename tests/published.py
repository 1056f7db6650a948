"""What holds of every published size."""

from __future__ import annotations

import pytest

from graphs.spec import Architecture, Variant
from graphs.trace import count_parameters


def counted(*architectures: type[Architecture]) -> list[Variant]:
    """The published sizes, each asserted to have the published number of parameters, within 1%."""
    sizes = [v for architecture in architectures for v in architecture.variants() if v.parameters]
    assert sizes
    for variant in sizes:
        assert count_parameters(variant.architecture) == pytest.approx(variant.parameters, rel=0.01)
    return sizes
