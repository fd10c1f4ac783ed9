"""Warnings that point at the user's line."""

import inspect
import warnings

_INSIDE = {"ovit_engine", "torch", "contextlib"}  # frames of these are passed over


def warn(message: str) -> None:
    """Warn at the innermost line outside of this package and torch.

    `skip_file_prefixes` of `warnings.warn` does the same from Python 3.12 on.
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level if frame is not None else 2)
