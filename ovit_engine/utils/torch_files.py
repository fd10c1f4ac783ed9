"""Files that torch reads without running any code, written atomically, with errors in plain words."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ovit_engine.utils.files import atomic_write


def save_file(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers and strings, or leave the file that is there.

    Raises:
        OSError: the disk is full, or the folder can't be written.
    """
    atomic_write(path, lambda stream: _save(dict(state), stream))


def load_file(path: Path, *, lazily: bool = False) -> Any:
    """Read what `save_file` or `torch.save` wrote, its tensors on the CPU; `lazily` leaves them on the disk until used.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged, or not a checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {str(path)!r}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except pickle.UnpicklingError as error:  # torch's own words advise to load it unsafely
        raise ValueError(f"{str(path)!r} is damaged, or no checkpoint") from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError) as error:
        reason = first_line(error).partition(" This is an internal miniz error")[0]
        raise ValueError(f"{str(path)!r} is damaged, or no checkpoint: {reason}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _save(state: dict[str, Any], stream: BinaryIO) -> None:
    try:
        torch.save(state, stream)
    except RuntimeError as error:  # torch hides what the disk said behind "unexpected pos"
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
