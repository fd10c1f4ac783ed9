"""What PyTorch's tensors were, kept beside a file so that a changed one can be named. Needs no PyTorch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import onnx

from ovit_engine.certificate.weights import to_array

# float32 answers of the same numbers differ by the order of their sums only
_TOLERANCE = 1e-5


def keep(array: np.ndarray, name: str) -> np.ndarray:
    """What is kept of a tensor: up to one dimension itself, a weight [a, ...] as its answer [a] to a fixed probe.

    The probe is a number of size 1 to 2 and of either sign for each element of a row, drawn by ``name``: a changed
    element changes its row's answer, and so do changes that would cancel in a sum.
    """
    if array.ndim < 2:
        return array
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    rows = array.reshape(len(array), -1)
    sizes = np.random.default_rng(seed).uniform(-1, 1, rows.shape[1])
    probe = sizes + np.copysign(1, sizes)
    answer: np.ndarray = (rows.astype(np.float64) @ probe).astype(np.float32)
    return answer


def keep_all(model: onnx.ModelProto, torch_tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of every tensor that the file holds as PyTorch has it, by the file's name for it.

    Left out is what the exporter folded into something else, and what PyTorch doesn't know.
    """
    kept = {}
    for tensor in model.graph.initializer:
        ours = torch_tensors.get(tensor.name)
        if ours is None or ours.size == 0 or ours.dtype.kind not in "fiub":
            continue
        stored = to_array(tensor)
        if ours.ndim >= 2 and ours.shape != stored.shape:
            ours = ours.swapaxes(-1, -2)
        if ours.ndim >= 2 and not np.array_equal(ours, stored):
            ours = ours.swapaxes(-1, -2)
        if np.array_equal(ours, stored):
            kept[tensor.name] = keep(ours, tensor.name)
    return kept


def changed(model: onnx.ModelProto, kept: Mapping[str, np.ndarray]) -> list[str]:
    """Tensors of the file that are not PyTorch's, a line each."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for name, before in kept.items():
        if name not in initializers:
            found.append(f"{name}: PyTorch's model has it, the file has no tensor of this name")
            continue
        array = to_array(initializers[name])
        now = keep(array, name)
        if now.shape != before.shape:
            found.append(f"{name}: of shape {array.shape}, which is not that of PyTorch's tensor")
            continue
        is_other = _differs(now, before) if array.ndim >= 2 else now != before
        if np.any(is_other):
            what = "rows" if array.ndim >= 2 else "values"
            ratio = "" if array.ndim >= 2 else _ratio(now, before)
            found.append(f"{name}: {int(np.sum(is_other))} of {before.size} {what} are not PyTorch's{ratio}")
    return found


def _differs(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    size = np.maximum(np.abs(before), np.abs(before).mean())
    differs: np.ndarray = ~(np.abs(now - before) <= _TOLERANCE * size)  # NaN differs
    return differs


def _ratio(now: np.ndarray, before: np.ndarray) -> str:
    """How far off, where every value is off by about one factor."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.asarray(now, dtype=np.float64) / np.asarray(before, dtype=np.float64)
    middle = float(np.median(ratios))
    is_factor = np.isfinite(ratios).all() and np.allclose(ratios, middle, rtol=1e-3) and abs(middle - 1) > 1e-3
    return f": {middle:.4g} times as large" if is_factor else ""
