"""Where statistics came from: enough for a manifest to say, and to collect them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Origin:
    """`data` as the user named it, `count` samples used of it, `images` of them with a picture, drawn by `seed`.

    `skipped` samples were unreadable, the first ten of them named in `skipped_names`. `tokens`: positions that the
    decoder saw, by modality. `weights` in words; `fingerprint` tells them apart.
    """

    model: str
    variant: str
    weights: str
    passes: str
    data: str
    count: int
    images: int
    seed: int
    decode_steps: int
    skipped: int
    skipped_names: tuple[str, ...]
    tokens: Mapping[str, int]
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """What the manifest records."""
        return {**asdict(self), "skipped_names": list(self.skipped_names), "tokens": dict(self.tokens)}

    @classmethod
    def from_json(cls, value: Any) -> Origin:
        """The inverse. Raises ValueError where a field is missing or of another type."""
        kinds: dict[str, type] = {"int": int, "str": str, "tuple[str, ...]": list, "Mapping[str, int]": dict}
        if not isinstance(value, dict) or value.keys() != {field.name for field in fields(cls)}:
            raise ValueError("the origin lacks fields, or has others")
        for field in fields(cls):
            if not isinstance(value[field.name], kinds[str(field.type)]):
                raise ValueError(f"the origin's {field.name} is no {field.type}")
        return cls(**{**value, "skipped_names": tuple(map(str, value["skipped_names"]))})
