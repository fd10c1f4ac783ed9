"""How small a file can be: general compressors, and the entropy of its weights as a bound. Needs no PyTorch."""

from __future__ import annotations

import gzip
import math

import numpy as np
import onnx

from ovit_engine.certificate.weights import to_array

# of certificates: the highest levels take ten times as long for a few percent
GZIP_LEVEL = 6

ZSTD_LEVEL = 12

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

_GROUP = 4


def gzip_size(content: bytes, level: int = GZIP_LEVEL) -> int:
    """Bytes after gzip."""
    return len(gzip.compress(content, compresslevel=level, mtime=0))


def zstd_size(content: bytes, level: int = ZSTD_LEVEL) -> int | None:
    """Bytes after zstd; None where the package ``zstandard`` is not installed."""
    try:
        import zstandard
    except ModuleNotFoundError:
        return None
    return len(zstandard.ZstdCompressor(level=level).compress(content))


def position_bits(is_other: np.ndarray) -> float:
    """Bits that the places of True in a bool array take at the least.

    Each element for itself they take n * H(share). In groups of four neighbours along some axis they take the entropy
    of the group's pattern, which for 2:4 is log2(6) a group and not 4: the least of these counts.
    """
    bits = [_entropy(np.array([is_other.sum(), (~is_other).sum()]))]
    for axis, size in enumerate(is_other.shape):
        if size % _GROUP == 0:
            groups = np.moveaxis(is_other, axis, -1).reshape(-1, _GROUP)
            bits.append(_entropy(np.bincount(groups @ (1 << np.arange(_GROUP)))))
    return min(bits)


def entropy_bits(values: np.ndarray) -> float:
    """Bits that an array takes at the least: where its most frequent value (zero) is not, and the other values.

    ``values``: any shape and type, told apart by bit pattern. The others are coded each for itself by how often each
    occurs; their alphabet is not charged for, so that a short float tensor of distinct values is bounded low.
    """
    if values.size == 0:
        return 0.0
    patterns = np.ascontiguousarray(values).view(_WORDS[values.dtype.itemsize])
    words, counts = np.unique(patterns, return_counts=True)
    background = counts.argmax()
    return position_bits(patterns != words[background]) + _entropy(np.delete(counts, background))


def weight_bytes(model: onnx.ModelProto) -> tuple[int, int]:
    """Bytes of all initializers of two dimensions and more: as they are stored, and at their entropy."""
    weights = [to_array(tensor) for tensor in model.graph.initializer if len(tensor.dims) >= 2]
    weights = [array for array in weights if array.dtype.itemsize in _WORDS and array.dtype.kind in "fiub"]
    return sum(array.nbytes for array in weights), math.ceil(sum(map(entropy_bits, weights)) / 8)


def _entropy(counts: np.ndarray) -> float:
    """Bits for a sequence of symbols that occur so often."""
    counts = counts[counts > 0].astype(np.float64)
    return float((counts * np.log2(counts.sum() / counts)).sum()) if counts.size else 0.0
