"""Validated reading of a checkpoint's JSON configuration: every value checked against bounds before it sizes anything.

A config.json comes from wherever its weights came from. A negative, absurd or missing dimension must end as one line
that names the key, the value and the bound, not as an allocation of terabytes or a traceback deep in a module.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphs.errors import UserError, nearest
from graphs.files import shown

MAX_DIMENSION = 1 << 20


@dataclass(frozen=True)
class ConfigReader:
    """Typed access to a JSON object; `where` names it in messages (`config.json`, or `config.json: vision_config`).

    Every reader takes a key, a default and bounds. A key that is absent or null gives the default, which is trusted,
    or, where the default is None, a UserError; so does a value of the wrong type or out of bounds. `key in reader`
    tells whether an optional key is there.
    """

    values: Mapping[str, Any]
    where: str = "config.json"

    def __contains__(self, key: str) -> builtins.bool:
        return self.values.get(key) is not None

    def error(self, message: str) -> UserError:
        """A UserError about this object, for conditions between keys: `raise reader.error("hidden_size ...")`."""
        return UserError(f"{self.where}: {message}")

    def int(
        self,
        key: str,
        default: builtins.int | None = None,
        *,
        low: builtins.int = 1,
        high: builtins.int = MAX_DIMENSION,
    ) -> builtins.int:
        """An integer from `low` to `high`, both included."""
        wanted = f"an integer from {low} to {high}"
        value = self._value(key, default, wanted)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._refusal(key, value, wanted)
        return value

    def float(
        self,
        key: str,
        default: builtins.float | None = None,
        *,
        low: builtins.float = 0.0,
        high: builtins.float = 1e9,
    ) -> builtins.float:
        """A finite number above `low` and at most `high`."""
        wanted = f"a number above {low:g}, at most {high:g}"
        value = self._value(key, default, wanted)
        if value is None and default is not None:
            return default
        if not _is_number(value) or not low < value <= high:
            raise self._refusal(key, value, wanted)
        return float(value)

    def floats(
        self,
        key: str,
        default: Sequence[builtins.float] | None = None,
        *,
        length: builtins.int,
        low: builtins.float = -1e9,
        high: builtins.float = 1e9,
    ) -> tuple[builtins.float, ...]:
        """A list of `length` finite numbers above `low` and at most `high`."""
        wanted = f"a list of {length} numbers above {low:g}, at most {high:g}"
        value = self._value(key, default, wanted)
        if value is None and default is not None:
            return tuple(default)
        if not isinstance(value, list) or len(value) != length:
            raise self._refusal(key, value, wanted)
        if not all(_is_number(item) and low < item <= high for item in value):
            raise self._refusal(key, value, wanted)
        return tuple(float(item) for item in value)

    def bool(self, key: str, default: builtins.bool | None = None) -> builtins.bool:
        """True or false."""
        value = self._value(key, default, "true or false")
        if value is None and default is not None:
            return default
        if not isinstance(value, bool):
            raise self._refusal(key, value, "true or false")
        return value

    def choice(self, key: str, choices: Iterable[str], default: str | None = None) -> str:
        """One of the strings `choices`; another is refused with the nearest of them."""
        names = sorted(choices)
        value = self._value(key, default, f"one of {', '.join(names)}")
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in names:
            raise self.error(f"{key} is {shown(repr(value), 60)}; {nearest(shown(value, 60), names)}")
        return value

    def section(self, key: str) -> ConfigReader:
        """A reader of the JSON object under `key`; an absent one reads as empty: its keys' own defaults hold."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._refusal(key, value, "a JSON object")
        return ConfigReader(value or {}, f"{self.where}: {key}")

    def _value(self, key: str, default: object, wanted: str) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise self.error(f"{key} is absent; it must be {wanted}")
        return value

    def _refusal(self, key: str, value: object, wanted: str) -> UserError:
        return self.error(f"{key} is {shown(repr(value), 60)}; it must be {wanted}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
