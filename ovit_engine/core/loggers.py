"""What a run tells while it goes on, to anything that takes numbers: `Engine.log_to`."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from ovit_engine.masking.masks import Masks

Log = Callable[[dict[str, float], int], Any]  # (values by name, applied optimizer steps)


def learning_rates(optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """The learning rate of each parameter group as the optimizer holds it: "lr", or "lr/0", "lr/1" where several."""
    rates = [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    return {"lr": rates[0]} if len(rates) == 1 else {f"lr/{index}": rate for index, rate in enumerate(rates)}


class RateLogs:
    """Who is told the learning rates, and after how many steps each time."""

    def __init__(self) -> None:
        self._logs: list[tuple[Log, int]] = []

    def add(self, log: Log, every: int) -> None:
        """Tell `log` after each `every` steps. Raises ValueError where that is less than one."""
        if every < 1:
            raise ValueError(f"every must be at least 1 step, not {every!r}")
        self._logs.append((log, every))

    def tell(self, optimizers: Iterable[Optimizer], step: int) -> None:
        """Step number `step`, which counts from 1, was made."""
        for log, every in self._logs:
            if step % every == 0:
                log(learning_rates(optimizers), step)


def sparsities(masks: Masks) -> dict[str, float]:
    """The share of pruned weights: "sparsity" over all masked weights, "sparsity/<name>" of each."""
    if not masks.names():
        return {}
    return {"sparsity": masks.sparsity(), **{f"sparsity/{name}": masks.sparsity(name) for name in masks.names()}}


log = logging.getLogger(__name__)

# Called with what is being done, how much of it is done, and how much there is to do.
Progress = Callable[[str, int, int], None]


@dataclass
class _Pace:
    first: int  # what was done at the first report; the time that it took is not known
    done: int
    seconds: float = 0.0


class TimeLeft:
    """An estimate from the pace so far. Stages may take turns: a report stands for the time since the one before it."""

    def __init__(self) -> None:
        self._paces: dict[str, _Pace] = {}
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int, now: float) -> float | None:
        """Seconds that `what` will still take at the time `now`, None at its first report. What falls begins anew."""
        pace = self._paces.get(what)
        if pace is None or done < pace.done:
            pace = self._paces[what] = _Pace(done, done)
        else:
            pace.seconds += now - self._last
            pace.done = done
        self._last = now
        if done == pace.first:
            return None
        return pace.seconds / (done - pace.first) * (total - done)


class ProgressLog:
    """Says "ovit_prune: gradients 512 of 1024, about 80 s left" where work begins and every so many seconds.

    Args:
        say: takes the lines; our log at INFO without it.
        every: seconds between two lines.
    """

    def __init__(self, say: Callable[[str], None] | None = None, every: float = 10.0) -> None:
        self._say = log.info if say is None else say
        self._every = every
        self._time_left = TimeLeft()
        self._said: float | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say it, if it is time."""
        now = time.monotonic()
        left = self._time_left(what, done, total, now)
        if self._said is None:
            self._said = now
        if done == 0 or now - self._said >= self._every:
            self._said = now
            self._say(f"{what} {done} of {total}" + ("" if left is None else f", about {spell_seconds(left)} left"))


def spell_seconds(seconds: float) -> str:
    """80 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
