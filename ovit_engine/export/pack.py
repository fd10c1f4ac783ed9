"""Packed ONNX files: a bitmask and the non-zero values of each sparse weight, byte for byte the same once unpacked.

ONNX has sparse initializers, and ONNX Runtime takes them; but an index of 8 bytes for each value makes an int8 file
larger below 89 % sparsity, and in memory the weight is dense all the same (docs/export.md has the figures). A packed
file costs one bit a weight and is dense only once loaded. It is cut out of the bytes and not out of the parsed
graph, so that unpacking gives back the very file with its hash, whatever wrote it.

Layout, integers little-endian: 8 bytes magic, 4 bytes length of the header, header (JSON), then the streams that it
lists. "rest" is the file without its packed tensors, "mask" has a bit for each element (the first in the highest bit, a
tensor begins a byte), "values" the elements that are not the tensor's background. Of each packed tensor the header has
[name, offset in the file, bytes an element, background, elements, columns or 0 where it is read row by row].
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovit_engine.utils.files import atomic_write

SUFFIX = ".packed"
_MAGIC = b"OVITPK1\n"
_LENGTH = 4
_LEVEL = 9
_STREAMS = ("rest", "mask", "values")
_WORDS = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}
# below this the entry in the header costs more than is won
_MIN_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of one file in each form."""

    raw: int
    # by gzip -9 and zstd -19
    gzip: int
    # None where the package `zstandard` is not installed
    zstd: int | None
    # bitmasks and values as they are
    bitmask: int
    # the same, each stream deflated where that makes it smaller: the packed file
    packed: int
    # the packed file with its packed tensors at the entropy of positions and values, `sizes.entropy_bits`
    bound: int


def pack_file(path: str | Path, output: str | Path | None = None) -> Sizes:
    """Write the packed form of an ONNX file, beside it (``model.onnx.packed``) if ``output`` is not given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no ONNX file.
    """
    from ovit_engine.certificate.sizes import entropy_bits, gzip_size, zstd_size

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    output = path.with_name(path.name + SUFFIX) if output is None else Path(output)
    if output.exists() and output.samefile(path):
        raise ValueError(f"{str(path)!r} is the file to pack: name another output")
    content = path.read_bytes()
    try:
        packed = pack(content)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None
    atomic_write(output, lambda stream: stream.write(packed))
    header, _ = _read_header(packed)
    streams = {stream["name"]: stream for stream in header["streams"]}
    names = {entry[0] for entry in header["tensors"]}
    bits = sum(entropy_bits(words) for name, _, words in _initializers(content) if name in names)
    return Sizes(
        raw=len(content),
        gzip=gzip_size(content, level=9),
        zstd=zstd_size(content, level=19),
        bitmask=sum(stream["bytes"] for stream in streams.values()),
        packed=len(packed),
        bound=len(packed) - streams["mask"]["stored"] - streams["values"]["stored"] + math.ceil(bits / 8),
    )


def load_packed(path: str | Path) -> bytes:
    """The ONNX file that a packed one holds, for ``onnxruntime.InferenceSession`` or to be written. Needs NumPy only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no packed file, damaged, or not what was packed (its SHA-256 is checked).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return unpack(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None


def pack(content: bytes) -> bytes:
    """The packed form of an ONNX file's bytes. Raises ValueError if they are none."""
    tensors, masks, values, rest, position = [], [], [], [], 0
    for name, raw, words in _initializers(content):
        start = content.find(raw, position)
        found = _split(words) if start >= 0 else None
        if found is None:
            continue
        background, columns, mask, kept = found
        tensors.append([name, start, words.itemsize, background, words.size, columns])
        masks.append(mask)
        values.append(kept)
        rest.append(content[position:start])
        position = start + len(raw)
    rest.append(content[position:])
    streams = {"rest": b"".join(rest), "mask": b"".join(masks), "values": b"".join(values)}
    stored = {name: _smaller(stream) for name, stream in streams.items()}
    header = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "tensors": tensors,
        "streams": [
            {"name": name, "bytes": len(streams[name]), "stored": len(data), "deflated": len(data) < len(streams[name])}
            for name, data in stored.items()
        ],
    }
    text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), _LEVEL)
    return b"".join([_MAGIC, len(text).to_bytes(_LENGTH, "little"), text, *stored.values()])


def unpack(packed: bytes) -> bytes:
    """The bytes that `pack` was given. Raises ValueError for anything else than its result."""
    header, position = _read_header(packed)
    try:
        streams = _read_streams(header["streams"], packed, position)
        content = _join(header["tensors"], streams)
        is_same = len(content) == header["bytes"] and hashlib.sha256(content).hexdigest() == header["sha256"]
    except (zlib.error, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise ValueError(f"a damaged packed file: {error}") from None
    if not is_same:
        raise ValueError("a damaged packed file: what it unpacks to is not what was packed")
    return content


def _initializers(content: bytes) -> Iterable[tuple[str, bytes, np.ndarray]]:
    """(name, bytes, the same as words of its shape) of each initializer that may be packed, in the file's order."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx import helper

    try:
        model = onnx.load_model_from_string(content)
    except DecodeError:
        raise ValueError("no ONNX file") from None
    if not content:  # to protobuf an empty message
        raise ValueError("no ONNX file")
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        size = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize if len(raw) >= _MIN_BYTES else 0
        # types of less than a byte fill none to the brim
        if size in _WORDS and len(raw) == size * math.prod(tensor.dims):
            yield tensor.name, raw, np.frombuffer(raw, _WORDS[size]).reshape(tensor.dims)


def _split(elements: np.ndarray) -> tuple[int, int, bytes, bytes] | None:
    """(background, columns, bitmask, other elements); None where these are no smaller than all elements.

    A matrix is read column by column where its bitmask deflates better so, as that of a 2:4 weight [in, out] does:
    then ``columns`` says how many there are, else it is 0.
    """
    words, counts = np.unique(elements, return_counts=True)
    background = words[counts.argmax()]
    others = elements.size - int(counts.max())
    if math.ceil(elements.size / 8) + others * elements.itemsize >= elements.nbytes:
        return None
    ways = [(0, elements)] + ([(elements.shape[1], elements.T)] if elements.ndim == 2 else [])
    masks = [np.packbits(way != background).tobytes() for _, way in ways]
    best = min(range(len(ways)), key=lambda index: len(zlib.compress(masks[index])))
    columns, way = ways[best]
    return int(background), columns, masks[best], way[way != background].tobytes()


def _smaller(stream: bytes) -> bytes:
    deflated = zlib.compress(stream, _LEVEL)
    return deflated if len(deflated) < len(stream) else stream


def _read_header(packed: bytes) -> tuple[dict[str, Any], int]:
    """The header and where the streams begin."""
    if not packed.startswith(_MAGIC):
        raise ValueError("not a packed file of ovit-engine")
    begin = len(_MAGIC) + _LENGTH
    end = begin + int.from_bytes(packed[len(_MAGIC) : begin], "little")
    try:
        header = json.loads(zlib.decompress(packed[begin:end]))
    except (zlib.error, ValueError) as error:
        raise ValueError(f"a damaged packed file: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("a damaged packed file: its header is none")
    return header, end


def _read_streams(listed: Iterable[Mapping[str, Any]], packed: bytes, position: int) -> dict[str, bytes]:
    streams = {}
    for entry in listed:
        data = packed[position : position + entry["stored"]]
        position += entry["stored"]
        if entry["deflated"]:  # never more than is stated, whatever the stream holds
            data = zlib.decompressobj().decompress(data, entry["bytes"] + 1)
        if len(data) != entry["bytes"]:
            raise ValueError(f"{len(data)} of {entry['bytes']} bytes in stream {entry['name']!r}")
        streams[entry["name"]] = data
    if tuple(streams) != _STREAMS or position != len(packed):
        raise ValueError("its streams are not those of its header")
    return streams


def _join(tensors: Iterable[tuple[str, int, int, int, int, int]], streams: Mapping[str, bytes]) -> bytes:
    rest, mask, values = (memoryview(streams[name]) for name in _STREAMS)
    parts: list[bytes | memoryview] = []
    written = 0
    for name, start, size, background, count, columns in tensors:
        before, width = start - written, math.ceil(count / 8)
        if before < 0 or before > len(rest) or count < 0 or width > len(mask):
            raise ValueError(f"{name} lies outside of the file")
        is_other = np.unpackbits(np.frombuffer(mask[:width], np.uint8), count=count).astype(bool)
        length = int(is_other.sum()) * size
        elements = np.full(count, background, _WORDS[size])
        elements[is_other] = np.frombuffer(values[:length], _WORDS[size])
        by_rows = elements.reshape(columns, -1).T if columns else elements
        parts += [rest[:before], by_rows.tobytes()]
        rest, mask, values = rest[before:], mask[width:], values[length:]
        written = start + elements.nbytes
    return b"".join([*parts, rest])
