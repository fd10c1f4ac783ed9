"""What is raised when a file is not what it should be."""

from __future__ import annotations

from collections.abc import Sequence


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
