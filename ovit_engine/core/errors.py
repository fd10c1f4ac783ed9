"""What is wrong with a recipe, and where in its file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """A place in a recipe file; lines and columns count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class RecipeError(ValueError):
    """A recipe that cannot be followed: what, where (file:line:column), the value, the nearest right name."""


class TooShortError(RecipeError):
    """A recipe that needs a longer training than it gets."""
