"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
