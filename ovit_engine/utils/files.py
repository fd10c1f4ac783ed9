"""Write files so that readers find the old file or the new one, whatever a full disk or a kill stops."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

ABANDONED = 3600.0  # seconds

Content = bytes | str | Callable[[BinaryIO], object]


def atomic_write(path: str | Path, content: Content) -> None:
    """Write `path`, or leave the file that is there.

    Args:
        content: the bytes, the text (UTF-8), or a function that writes to a stream.

    Raises:
        OSError: the disk is full, or the folder is missing or not writable; also whatever `content` raises.
    """
    with staged(path) as draft, draft.open("xb") as stream:
        if callable(content):
            content(stream)
        else:
            stream.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def staged(path: str | Path) -> Iterator[Path]:
    """Yield a draft of `path` in a hidden scratch folder next to it, and publish the folder's files at the end.

    The files reach the disk, then each is renamed over the file of the same name next to `path`, the draft last. If the
    block raises, nothing is published. A killed process leaves the scratch folder behind; a later write of the same
    path removes it once it is an hour old.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: name the file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent}")
    remove_leftovers(path)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    scratch.mkdir()
    try:
        yield scratch / path.name
        files = sorted(scratch.iterdir(), key=lambda file: file.name == path.name)
        for file in files:
            _sync(file, os.O_RDWR)  # a full disk may be noticed only here
        for file in files:
            os.replace(file, path.with_name(file.name))
    finally:
        shutil.rmtree(scratch)
    with suppress(PermissionError):  # Windows cannot open folders
        _sync(path.parent, os.O_RDONLY)


def remove_leftovers(path: Path, *, older: float = ABANDONED) -> None:
    """Remove what killed writes of `path` left: files and folders `.NAME.????????.tmp` next to it.

    Args:
        older: seconds since the leftover last changed; another process may be writing a younger one.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        with suppress(OSError):  # another process removed it first, or it belongs to another user
            changed = max(part.stat().st_mtime for part in (leftover, *leftover.glob("*")))
            if time.time() - changed > older:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
