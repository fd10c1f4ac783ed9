"""How far long work is: bars on a terminal, lines now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

log = logging.getLogger(__name__)

# called with what is being done, how much of it is done, and how much there is to do
Progress = Callable[[str, int, int], None]


class ProgressReport:
    """Report progress as `report("ovit_prune: gradients", 512, 1024)`; use it as a context manager to show bars.

    Args:
        console: where bars are drawn if it is a terminal, and lines are printed otherwise; the log if omitted.
        every: seconds between two lines.
    """

    def __init__(self, console: Console | None = None, every: float = 10.0) -> None:
        self._console, self._every = console, every
        self._said: float | None = None
        self._tasks: dict[str, TaskID] = {}

    @cached_property
    def _bars(self) -> Bars:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # without a terminal nothing is drawn, and the time left is estimated all the same
        return Bars(*columns, console=self._console, transient=True, disable=not self.has_bars, get_time=time.monotonic)

    @property
    def has_bars(self) -> bool:
        """Whether bars are drawn."""
        return self._console is not None and self._console.is_terminal

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Draw or print how far `what` is; its bar disappears when it is done."""
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        task = self._tasks[what]
        if done < self._bars.tasks[task].completed:
            self._bars.reset(task)
        self._bars.update(task, total=total, completed=done, visible=done < total)
        now = time.monotonic()
        if self._said is None:
            self._said = now
        if not self.has_bars and (done == 0 or now - self._said >= self._every):
            self._said = now
            left = self._bars.tasks[task].time_remaining
            line = f"{what} {done} of {total}" + (f", about {timedelta(seconds=left)} left" if left else "")
            log.info(line) if self._console is None else self._console.print(line)
