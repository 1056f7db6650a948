from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs.errors import UserError
from graphs.program import Signature
from graphs.spec import TensorSpec
from runtimes.base import Artifact
from runtimes.coreml import CoreMLRuntime
from tests.runtimes.mil.packages import ct, mb, save, types

SIGNATURE = Signature((TensorSpec("ids", (3,), torch.int64),), (TensorSpec("y", (3,), torch.float32),))


@pytest.fixture
def artifact(tmp_path):
    save(
        tmp_path / "m.mlpackage",
        {"ids": mb.TensorSpec((3,), types.int32)},
        lambda x: mb.cast(x=x, dtype="fp32", name="y"),
    )
    return Artifact(tmp_path, {"m": SIGNATURE}, {"m": "m.mlpackage"}, {"methods": {"m": {"images": []}}})


def test_arrays_come_and_go_in_the_signatures_types(artifact):
    runtime = CoreMLRuntime.load(artifact)
    (y,) = runtime.call("m", [np.array([3, 1, 2], np.int64)])
    assert (y.dtype, y.tolist()) == (np.float32, [3, 1, 2])
    assert runtime.version.endswith(f"coremltools {ct.__version__}")


def test_a_package_of_another_signature_is_refused(artifact):
    other = Signature((TensorSpec("tokens", (3,), torch.int64),), SIGNATURE.outputs)
    with pytest.raises(
        UserError, match=r"takes \['ids'\] and gives \['y'\], the manifest says \['tokens'\] and \['y'\]"
    ):
        CoreMLRuntime.load(Artifact(artifact.directory, {"m": other}, artifact.files, artifact.details))


def test_a_missing_package_is_named(artifact):
    with pytest.raises(UserError, match=r"none\.mlpackage: no such \.mlpackage directory"):
        CoreMLRuntime.load(Artifact(artifact.directory, artifact.signatures, {"m": "none.mlpackage"}))
