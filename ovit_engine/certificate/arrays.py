"""Arrays from an .npz file of a stranger, within bounds. Needs no PyTorch."""

from __future__ import annotations

import zlib
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile, ZipFile

import numpy as np

_MOST_ARRAYS = 20_000

# what NumPy and zipfile raise of broken files
_UNREADABLE = (
    KeyError,
    EOFError,
    IndexError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    BadZipFile,
    TokenError,
    zlib.error,
)


def read_arrays(path: Path, largest: int) -> dict[str, np.ndarray]:
    """Read every array of an .npz file; `largest` is how many bytes they may have, unpacked.

    Raises:
        ValueError: it is something else, damaged, or larger.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with ZipFile(path) as entries:
            size, count = sum(entry.file_size for entry in entries.infolist()), len(entries.infolist())
        if size > largest or count > _MOST_ARRAYS:
            raise ValueError(f"it unpacks to {size:,} bytes in {count:,} arrays; at most {largest:,} are read")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file}
    except _UNREADABLE as error:
        reason = str(error).encode("ascii", "replace").decode().partition("\n")[0][:120]  # it may quote the bytes
        raise ValueError(f"{path.name} can't be read: {reason}") from error
