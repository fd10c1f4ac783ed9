"""What is raised when a file is not what it should be."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError


class CertificateError(ValueError):
    """A file breaks its promise; ``violations`` has one line for each fact."""

    def __init__(self, summary: str, violations: Sequence[str]) -> None:
        self.summary = summary
        self.violations = tuple(violations)
        super().__init__(f"{summary}: {'; '.join(self.violations)}")


class ExportError(CertificateError):
    """The file could not be written, or would break the promise; nothing was left at its path."""


class VerificationError(CertificateError):
    """A file differs from its certificate, or from what its metadata promise."""


def first_faults(error: ValueError) -> str:
    """Return what is wrong with a text, in one line: the first fields that pydantic rejects, or the error itself."""
    if not isinstance(error, ValidationError):
        return (str(error).splitlines() or ["empty"])[0]
    faults = [(".".join(map(str, fault["loc"])), fault["msg"]) for fault in error.errors()]
    return "; ".join(f"{where}: {what}" if where else what for where, what in faults[:3])
