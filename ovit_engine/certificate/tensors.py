"""Hashes of PyTorch's tensors, kept with the reference: a changed tensor of the file can be named. Needs no PyTorch."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import numpy as np
import onnx

from ovit_engine.certificate.stored import stored_tensors
from ovit_engine.certificate.weights import read_weights, to_array


def hash_tensors(
    model: onnx.ModelProto, torch_tensors: Mapping[str, np.ndarray], promised: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Return the SHA-256 (uint8 [32]) of each tensor that the file holds as PyTorch has it, by the file's name for it.

    Other tensors, those that the exporter folded or that PyTorch does not know, are left out, except for the weights
    of products and the tensors named `promised`: each of them has a hash.
    """
    always = {*read_weights(model), *promised}
    kept = {}
    for name, tensor in stored_tensors(model).items():
        ours = torch_tensors.get(name)
        if name not in always and (ours is None or ours.size == 0 or ours.dtype.kind not in "fiub"):
            continue
        stored = to_array(tensor)
        ways = [] if ours is None else [ours, ours.swapaxes(-1, -2)] if ours.ndim >= 2 else [ours]
        if name in always or any(np.array_equal(way, stored) for way in ways):
            kept[name] = _hash(stored)
    return kept


def changed_tensors(model: onnx.ModelProto, kept: Mapping[str, np.ndarray]) -> list[str]:
    """Return a line for each tensor of the file that is not PyTorch's."""
    initializers = stored_tensors(model)
    missing = [f"{name}: PyTorch's model has it, the file has not" for name in kept.keys() - initializers.keys()]
    return sorted(missing) + [
        f"{name}: differs from PyTorch's tensor"
        for name, digest in kept.items()
        if name in initializers and not np.array_equal(_hash(to_array(initializers[name])), digest)
    ]


def _hash(array: np.ndarray) -> np.ndarray:
    content = f"{array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes()
    return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
