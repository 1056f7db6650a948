"""States: tensors that a program keeps from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass

from runtimes.base import Array
from runtimes.mil.registry import op


@dataclass
class State:
    """What a state variable stands for: a tensor that operators read and replace, never change in place."""

    value: Array


@op("read_state", moves=True)
def read_state(input: State) -> Array:  # noqa: A002 (MIL names it so)
    """The tensor that the state holds now."""
    return input.value


@op("write_state", moves=True)
def write_state(input: State, data: Array) -> None:  # noqa: A002 (MIL names it so)
    """Replace the tensor. Raises ValueError where its shape changes."""
    if data.shape != input.value.shape:
        raise ValueError(f"writes {list(data.shape)} to a state of shape {list(input.value.shape)}")
    input.value = data


@op("coreml_update_state", moves=True)
def coreml_update_state(state: State, value: Array) -> Array:
    """`write_state`, giving the tensor back (how coremltools' own form of a program spells it)."""
    write_state(state, value)
    return value
