"""What reaches the terminal: tables as wide as it is, or unwrapped in a file or a pipe; errors alone of chatty logs."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_UNLIMITED = 1000  # characters; no table of ours is so wide, and a table takes no more than it needs


def table_console() -> Console:
    """Return a console for tables on standard output.

    Rich uses 80 columns and pads each line if the output is not a terminal, which cut names off in redirected tables.
    The variable COLUMNS limits the width in both cases.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False)  # recipes from strangers hold brackets
    if console.is_terminal:
        return console
    console.file = cast(IO[str], _Trimmed())
    if "COLUMNS" not in os.environ:
        console.width = _UNLIMITED
    return console


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[str] = ()) -> Table:
    """Return a table without lines, its columns on the right except those named in `left`."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in header:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=column not in left)
    for row in rows:
        table.add_row(*row)
    return table


class _Trimmed(io.TextIOBase):
    """Standard output without blanks at the ends of lines."""

    def write(self, text: str) -> int:
        sys.stdout.write(re.sub(r" +$", "", text, flags=re.MULTILINE))
        return len(text)

    def flush(self) -> None:
        sys.stdout.flush()


@contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Let these loggers ("" is the root) pass nothing but errors."""
    # a filter and not a level: libraries set their level when they are imported
    logs = [logging.getLogger(name) for name in names]
    for log in logs:
        log.addFilter(_is_error)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
