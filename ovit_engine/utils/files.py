"""Files that are whole or as they were: what a full disk or a kill can't halve."""

from __future__ import annotations

import glob
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

ABANDONED = 3600.0  # seconds


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write `path` through `write(stream)` so that readers find the old file or the new one, never half of one.

    The bytes go to a hidden file beside it, reach the disk, and are then renamed over it. Where anything fails the
    hidden file is removed and the old one stays. A killed process leaves the hidden file behind, which a later write of
    the same path removes once it has not grown for an hour.

    Raises:
        OSError: the disk is full, the folder missing or not writable; whatever else `write` raises.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: name the file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent}")
    remove_leftovers(path)
    # the name is new each time: what a killed process left is never in the way
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())  # a full disk may only be noticed here
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_leftovers(path: Path, *, older: float = ABANDONED) -> None:
    """Remove hidden files of writes of `path` that were killed; where another process may be writing, so old ones only.

    Args:
        older: seconds since a hidden file last grew.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        try:
            if time.time() - leftover.stat().st_mtime > older:
                leftover.unlink()
        except OSError:  # another process was faster, or it is not ours to remove
            continue


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can open folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A scratch folder beside the final files (same file system, so that ``os.replace`` is atomic)."""
    with tempfile.TemporaryDirectory(prefix=".ovit-export-", dir=directory) as folder:
        yield Path(folder)


def write_bytes(path: Path, content: bytes) -> None:
    """Write and wait until the disk has it: a full disk is noticed here and not after a rename."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
