"""Finding architectures by name, without importing what is not asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from graphs import registry
from graphs.errors import UserError


def test_every_file_is_a_model_and_says_its_own_name() -> None:
    assert "mobilevlm" in registry.names()
    for name in registry.names():
        found = registry.architecture(name)
        assert found.name == name
        assert len({variant.name for variant in found.variants()}) == len(found.variants())
        assert "tiny" in {variant.name for variant in found.variants()}


def test_names_are_listed_without_importing_an_architecture() -> None:
    lines = ["import sys", "from graphs import registry", "registry.names()"]
    code = "; ".join([*lines, "print('graphs.architectures.mobilevlm' in sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown model 'mobilvlm': did you mean 'mobilevlm'"):
        registry.architecture("mobilvlm")
    with pytest.raises(UserError, match="did you mean 'mobilevlm-3b'"):
        registry.variant("mobilevlm", "mobilevlm-3B")
