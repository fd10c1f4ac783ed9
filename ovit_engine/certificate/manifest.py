"""What is left of a model from which heads and units were removed: enough to rebuild it. Needs no PyTorch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


def check_unique(names: Iterable[str]) -> None:
    """Raise ValueError for a name that occurs twice: what it names would count twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} occurs twice")


def check_keys(text: str) -> None:
    """Raise ValueError for a key that occurs twice in one object of a JSON text: readers differ in which one counts."""

    def checked(pairs: list[tuple[str, Any]]) -> None:
        check_unique(key for key, _ in pairs)

    try:
        json.loads(text, object_pairs_hook=checked)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class Part(BaseModel):
    """One attention or MLP module from which heads or hidden units could be removed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="name of the module, e.g. blocks.0.attn")
    kind: Literal["heads", "units"] = Field(description="what was removed")
    of: int = Field(ge=1, description="how many there were in the model as it was made")
    width: int = Field(ge=1, description="features each has: head_dim, or 1 for a unit")
    kept: tuple[int, ...] = Field(min_length=1, description="those that are left, by their number in that model")

    @model_validator(mode="after")
    def _in_range(self) -> Part:
        if list(self.kept) != sorted(set(self.kept)) or self.kept[0] < 0 or self.kept[-1] >= self.of:
            raise ValueError(f"{self.name}: kept {self.kind} must rise within 0-{self.of - 1}")
        return self

    def __str__(self) -> str:
        return f"{self.name}: {len(self.kept)} of {self.of} {self.kind}"

    def axes(self) -> dict[str, tuple[int, int, int]]:
        """(axis, size now, size in the model as it was made) of each weight [out, in] that is smaller for it."""
        now, before = len(self.kept) * self.width, self.of * self.width
        writer, reader, times = ("qkv", "proj", 3) if self.kind == "heads" else ("fc1", "fc2", 1)
        prefix = f"{self.name}." if self.name else ""
        return {
            f"{prefix}{writer}.weight": (0, times * now, times * before),
            f"{prefix}{reader}.weight": (1, now, before),
        }


class Manifest(BaseModel):
    """The parts of a model that could lose heads or units, in the model's order; those that lost none as well."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: tuple[Part, ...] = ()

    @field_validator("parts")
    @classmethod
    def _each_once(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        check_unique(part.name for part in parts)
        return parts

    def __bool__(self) -> bool:
        """Whether anything was removed."""
        return any(len(part.kept) < part.of for part in self.parts)

    def __str__(self) -> str:
        """How many heads and units are left, e.g. "12 of 24 heads, 614 of 1536 units"."""
        if not self:
            return "nothing removed"
        counts = []
        for kind in ("heads", "units"):
            parts = [part for part in self.parts if part.kind == kind]
            if parts:
                counts.append(f"{sum(len(part.kept) for part in parts)} of {sum(part.of for part in parts)} {kind}")
        return ", ".join(counts)

    def contradictions(self, shapes: dict[str, tuple[int, ...]]) -> list[str]:
        """Where weights of these shapes [out, in] are not those of such a model, a line each."""
        found = []
        for part in self.parts:
            for name, (axis, size, _) in part.axes().items():
                shape = shapes.get(name)
                if shape is not None and shape[axis] != size:
                    found.append(f"{name} is {list(shape)}, the manifest keeps {len(part.kept)} {part.kind}")
        return found
