"""JSON that says one thing: no key twice, no NaN, an object at the top."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError


def read_object(text: str) -> dict[str, Any]:
    """The object that a text holds.

    Raises:
        ValueError: it is no JSON or something else than an object, holds NaN or infinity, or names a key twice, of
            which readers take one or the other.
    """
    try:
        found = json.loads(text, object_pairs_hook=_each_once, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object: {text[:40]!r}")
    return found


def first_faults(error: ValueError) -> str:
    """What is wrong with a text, in a line: of what pydantic has against it the first fields."""
    if not isinstance(error, ValidationError):
        return (str(error).splitlines() or ["empty"])[0]
    faults = [(".".join(map(str, fault["loc"])), fault["msg"]) for fault in error.errors()]
    return "; ".join(f"{where}: {what}" if where else what for where, what in faults[:3])


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")
