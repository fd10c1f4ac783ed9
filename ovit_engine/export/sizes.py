"""How small a file can be: general compressors, and the entropy of its weights as a bound. Needs no PyTorch."""

from __future__ import annotations

import gzip
import math

import numpy as np
import onnx

from ovit_engine.export.graph import to_array

# the settings that certificates are compared under
_GZIP_LEVEL = 9
_ZSTD_LEVEL = 19
_BINS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def gzip_size(content: bytes) -> int:
    """Bytes after gzip -9."""
    return len(gzip.compress(content, compresslevel=_GZIP_LEVEL, mtime=0))


def zstd_size(content: bytes) -> int | None:
    """Bytes after zstd -19; None where the package ``zstandard`` is not installed."""
    try:
        import zstandard
    except ModuleNotFoundError:
        return None
    return len(zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(content))


def entropy_bits(values: np.ndarray) -> float:
    """Bits that positions and values of an array take at the least, coded element by element.

    ``values``: any shape and type. With z of n elements at the most frequent bit pattern p (zero, in a sparse weight),
    positions cost n * H(z / n) and the n - z others the empirical entropy of their bit patterns. The alphabet itself
    is not charged for, so that a short float tensor of distinct values is bounded low.
    """
    if values.size == 0:
        return 0.0
    patterns = np.ascontiguousarray(values).reshape(-1).view(_BINS[values.dtype.itemsize])
    counts = np.unique(patterns, return_counts=True)[1].astype(np.float64)
    # H(zero or not) + share of the others * H(others) is the entropy of all: the chain rule
    return float((counts * np.log2(values.size / counts)).sum())


def entropy_bytes(model: onnx.ModelProto, total: int) -> int:
    """The bound for a whole file of ``total`` bytes: weights of rank 2 and more at their entropy, the rest as it is."""
    weights = [to_array(tensor) for tensor in model.graph.initializer if len(tensor.dims) >= 2]
    weights = [array for array in weights if array.dtype.itemsize in _BINS and array.dtype.kind in "fiub"]
    rest = total - sum(array.nbytes for array in weights)
    return rest + math.ceil(sum(entropy_bits(array) for array in weights) / 8)
