"""The weights of a float file beside those of the int8 file that was made from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ovit_engine.export.qdq import Layer, Weight


def match_weights(layers: Sequence[Layer], reference: Sequence[Layer]) -> dict[str, np.ndarray] | str:
    """The float weight of each layer as that layer reads it, by the layer's output; a line where there is none.

    By name; by order where names differ and both files have as many weights.
    """
    wanted = [layer for layer in layers if layer.weight is not None]
    offered = [layer for layer in reference if layer.weight is not None]
    by_name = {layer.name: layer for layer in offered}
    pairs = [(layer, by_name.get(layer.name)) for layer in wanted]
    if any(other is None for _, other in pairs):
        if len(wanted) != len(offered):
            missing = next(layer.name for layer, other in pairs if other is None)
            return f"the reference has no weight {missing!r}"
        pairs = list(zip(wanted, offered, strict=True))
    found = {}
    for layer, other in pairs:
        assert other is not None
        assert layer.weight is not None
        assert other.weight is not None
        values = other.weight.values
        if _is_in_out(layer) != _is_in_out(other):
            values = np.swapaxes(values, -1, -2)
        if values.shape != layer.weight.values.shape:
            return f"{layer.name!r} is {list(layer.weight.values.shape)}, in the reference {list(values.shape)}"
        found[layer.output] = values
    return found


def others(weight: Weight, reference: np.ndarray) -> np.ndarray:
    """bool: elements that are neither the reference's value, rounded or cut off at the last level, nor pruned."""
    distance = np.abs(weight.values - reference)
    least, is_inside = 1e-6 * np.abs(reference).max(), np.True_
    if weight.scale is not None:
        levels = np.abs(weight.values / weight.scale)
        least, is_inside = 0.51 * weight.scale, levels < levels.max() - 0.5
    is_other: np.ndarray = (weight.values != 0) & (distance > least) & is_inside
    return is_other


def pruned_by(weight: Weight, reference: np.ndarray) -> np.ndarray:
    """bool: zeros of the file that rounding does not explain: the reference's value is more than half a level."""
    least = 0.0 if weight.scale is None else 0.5 * weight.scale * (1 + 1e-5)
    pruned: np.ndarray = (weight.values == 0) & (np.abs(reference) > least)
    return pruned


def _is_in_out(layer: Layer) -> bool:
    """Whether its operator reads the weight as [in, out]."""
    assert layer.weight is not None
    if layer.op == "MatMul":
        return layer.weight.position == 1
    return layer.op == "Gemm" and not layer.transposed
