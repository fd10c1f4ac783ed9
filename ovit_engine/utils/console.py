"""Where tables go: as wide as the terminal, and as wide as they are where a file or a pipe takes them."""

from __future__ import annotations

import io
import os
import re
import sys
from typing import IO, TYPE_CHECKING, cast

if TYPE_CHECKING:
    from rich.console import Console


_UNLIMITED = 1000  # characters; no table of ours is so wide, and a table takes no more than it needs


def table_console() -> Console:
    """A console for tables on standard output.

    Rich takes 80 columns for anything that is no terminal, so a redirected table lost the ends of its names, and fills
    each line with blanks. The variable COLUMNS limits the width of both.
    """
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal:
        return console
    console.file = cast(IO[str], _Trimmed())
    if "COLUMNS" not in os.environ:
        console.width = _UNLIMITED
    return console


class _Trimmed(io.TextIOBase):
    """Standard output, lines without the blanks at their ends."""

    def write(self, text: str) -> int:
        sys.stdout.write(re.sub(r" +$", "", text, flags=re.MULTILINE))
        return len(text)

    def flush(self) -> None:
        sys.stdout.flush()
