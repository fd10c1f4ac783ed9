"""Files that are whole or as they were: what a full disk or a kill can't halve."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write `path` through `write(stream)` so that readers find the old file or the new one, never half of one.

    The bytes go to a hidden file beside it, reach the disk, and are then renamed over it. Where anything fails the
    hidden file is removed and the old one stays; a killed process leaves the hidden file behind, and no other harm.

    Raises:
        OSError: the disk is full, the folder missing or not writable; whatever else `write` raises.
    """
    path = Path(path)
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
