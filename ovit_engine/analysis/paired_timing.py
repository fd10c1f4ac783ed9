"""Timing things side by side: rounds in random order, ratios within a round, verdicts that follow the interval.

Whatever else the machine does affects all of a round alike; the interval comes from a bootstrap over rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ovit_engine.certificate.ratio import SESSION_NOISE, Ratio

# called with a number of runs, returns the seconds of one
Timer = Callable[[int], float]

# the least that one timing covers: a clock read and a wake-up cost microseconds
_MIN_SECONDS = 0.004

_WARM_UP = 3

_RESAMPLES = 2000


def paired_ratio(
    baseline: np.ndarray, other: np.ndarray, generator: np.random.Generator, *, noise: float = SESSION_NOISE
) -> Ratio:
    """Speed of ``other`` relative to ``baseline`` from latencies [rounds] of the same rounds."""
    ratios = baseline / other
    draws = generator.integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Ratio(median=float(np.median(ratios)), low=float(low), high=float(high), noise=noise)


def self_noise(once: np.ndarray, again: np.ndarray, generator: np.random.Generator) -> float:
    """How far one thing is from itself, set up twice and timed in the same rounds: at least ``SESSION_NOISE``."""
    itself = paired_ratio(once, again, generator)
    return max(SESSION_NOISE, itself.high - 1, 1 / itself.low - 1)


def measure_rounds(
    timers: Sequence[Timer],
    repeats: int,
    generator: np.random.Generator,
    progress: Callable[[int, int], None] | None = None,
    *,
    min_seconds: float = _MIN_SECONDS,
) -> np.ndarray:
    """Seconds a run, [timers, rounds]: each is timed once a round, in random order, after a warm-up."""
    for timer in timers:
        timer(_WARM_UP)
    # timings of equal length: a longer one would be struck by other work more often; the least of five is the quiet one
    loops = [max(1, round(min_seconds / max(min(timer(3) for _ in range(5)), 1e-7))) for timer in timers]
    seconds = np.empty((len(timers), repeats))
    for index in range(repeats):
        for which in generator.permutation(len(timers)):
            seconds[which, index] = timers[which](loops[which])
        if progress is not None:
            progress(index + 1, repeats)
    return seconds
