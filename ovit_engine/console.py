"""Where tables go: as wide as the terminal, and as wide as they are where a file or a pipe takes them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_UNLIMITED = 1000  # characters; no table of ours is so wide, and a table takes no more than it needs


def table_console() -> Console:
    """A console for tables on standard output.

    Rich takes 80 columns for anything that is no terminal, so a redirected table lost the ends of its names. The
    variable COLUMNS limits the width of both.
    """
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNLIMITED
    return console
