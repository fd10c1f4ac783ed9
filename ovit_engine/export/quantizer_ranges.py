"""Ranges of an activation quantizer from the values it saw, in NumPy: what another observer would have taken."""

from __future__ import annotations

import numpy as np

# names of the recipe's observers
OBSERVERS = ("min_max", "percentile", "mse")
_PERCENTILE = 99.99
_FRACTIONS = np.linspace(1.0, 0.02, 50)
_SAMPLE = 2**18


def quantizer_range(
    values: np.ndarray, integers: tuple[type[np.generic], bool], observer: str
) -> tuple[np.float32, np.generic]:
    """(scale, zero point) that `observer` takes from `values` [N].

    Args:
        integers: (np.uint8 or np.int8, whether the zero point must be 0).
    """
    kind, symmetric = integers
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if observer == "percentile" and finite.size:
        low, high = (float(each) for each in np.percentile(finite, [100 - _PERCENTILE, _PERCENTILE]))
    if observer == "mse" and finite.size:
        some = finite if finite.size <= _SAMPLE else np.random.default_rng(0).choice(finite, _SAMPLE)
        errors = [_error(some, *_parameters(low * f, high * f, kind, symmetric), kind) for f in _FRACTIONS]
        best = _FRACTIONS[int(np.argmin(errors))]
        low, high = low * best, high * best
    scale, zero_point = _parameters(low, high, kind, symmetric)
    return np.float32(scale), kind(zero_point)


def _parameters(low: float, high: float, kind: type[np.generic], symmetric: bool) -> tuple[float, int]:
    bounds = np.iinfo(kind)  # type: ignore[type-var]
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return max(max(-low, high) / bounds.max, 1e-12), 0
    scale = max((high - low) / (bounds.max - bounds.min), 1e-12)
    return scale, int(np.clip(round(bounds.min - low / scale), bounds.min, bounds.max))


def _error(values: np.ndarray, scale: float, zero_point: int, kind: type[np.generic]) -> float:
    bounds = np.iinfo(kind)  # type: ignore[type-var]
    levels = np.clip(np.rint(values / scale) + zero_point, bounds.min, bounds.max)
    return float(np.square((levels - zero_point) * scale - values).sum())
