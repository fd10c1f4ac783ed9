"""What is wrong with a recipe, and where in its file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, PrivateAttr


@dataclass(frozen=True)
class Origin:
    """A place in a recipe file; lines and columns count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class Placed(BaseModel):
    """Options that remember where in a recipe file they stood."""

    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)  # of each option, "" = all of them

    @property
    def origins(self) -> Mapping[str, Origin]:
        """Where each option stands; "" is the place of all of them."""
        return self._origins

    def set_origins(self, origins: Mapping[str, Origin]) -> Self:
        """Let errors say where in a file these options stand."""
        self._origins = dict(origins)
        return self

    def origin(self, option: str = "") -> Origin | None:
        """Return where `option` stands, or else what it is of ("scheduler_args.min_lr"); None outside of files."""
        return self._origins.get(option) or self._origins.get(option.partition(".")[0]) or self._origins.get("")


_MAX_MESSAGE = 600  # characters: recipes come from strangers, and a value may be as long as the file


class RecipeError(ValueError):
    """A recipe that cannot be followed: what, where (file:line:column), the value, the nearest right name."""

    def __init__(self, message: str) -> None:
        if len(message) > _MAX_MESSAGE:
            message = f"{message[: _MAX_MESSAGE - 100]} ... {message[-95:]}"
        super().__init__(message)


class TooShortError(RecipeError):
    """A recipe that needs a longer training than it gets."""
