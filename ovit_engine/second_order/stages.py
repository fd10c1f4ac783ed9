"""How far a pruning event is and where its time goes."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

# Called with a stage, what is done of it and all there is to do, over all passes: gradients are counted one by one,
# the other stages in weights.
Progress = Callable[[str, int, int], None]


class Stages:
    """Seconds of each stage (on a GPU up to what was launched), and reports to whoever wants to know."""

    def __init__(self, totals: Mapping[str, int], progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._totals = totals
        self._done = dict.fromkeys(totals, 0)
        self._progress = progress

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time of the body for a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def advance(self, stage: str, amount: int) -> None:
        """So much more of a stage is done."""
        self._done[stage] += amount
        if self._progress is not None:
            self._progress(stage, self._done[stage], self._totals[stage])
