"""Paired latency of ONNX files: no claim without a measurement, no difference inside the noise.

Sessions are measured in turn within each round, in random order, so that whatever else the machine does strikes all of
them alike; the ratio is taken round by round and its interval comes from a bootstrap over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ovit_engine.export.certificate import Machine
from ovit_engine.export.machine import this_machine
from ovit_engine.export.runtime import open_session

if TYPE_CHECKING:
    from rich.console import Console

# one timing covers so many seconds at least: a clock read and a wake-up cost microseconds
_MIN_SECONDS = 0.004
_WARM_UP = 3
# on a quiet machine one file opened twice differs by up to 2 % (where its memory came to lie); under load by more
_SESSION_NOISE = 0.03
_RESAMPLES = 2000
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster than the baseline: median over rounds, 95 % interval."""

    median: float
    low: float
    high: float
    # a file differs so much from itself, opened twice and measured in the same rounds
    noise: float = _SESSION_NOISE

    @property
    def verdict(self) -> str:
        """In words; "faster" and "slower" only if the whole interval is further from 1 than a file is from itself."""
        if self.low <= 1 + self.noise and self.high >= 1 / (1 + self.noise):
            return f"within noise ({self.low:.2f}-{self.high:.2f}x)"
        factor, ends = self.median, (self.low, self.high)
        word = "faster"
        if self.high < 1.0:
            factor, ends, word = 1 / factor, (1 / self.high, 1 / self.low), "slower"
        return f"{factor:.2f}x {word} ({ends[0]:.2f}-{ends[1]:.2f}x)"


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One file at one batch size; latencies in seconds a batch."""

    path: Path
    batch_size: int
    median: float
    quartiles: tuple[float, float]
    # against the baseline; None for the baseline itself, or without one
    ratio: Ratio | None

    @property
    def throughput(self) -> float:
        """Images a second at the median latency."""
        return self.batch_size / self.median


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All rows, and where they were measured."""

    rows: tuple[BenchRow, ...]
    machine: Machine
    threads: int
    repeats: int

    def render(self, console: Console | None = None) -> None:
        """Print a table: in colour on a terminal, plain elsewhere."""
        from rich.console import Console as RichConsole
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("file")
        for column in ("batch", "ms", "quartiles", "images/s"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("against the baseline")
        for row in self.rows:
            low, high = (value * 1e3 for value in row.quartiles)
            cells = (f"{row.median * 1e3:.3f}", f"{low:.3f}-{high:.3f}", f"{row.throughput:.0f}")
            table.add_row(row.path.name, str(row.batch_size), *cells, "" if row.ratio is None else row.ratio.verdict)
        console = console or RichConsole()
        console.print(table)
        where = f"{self.machine.cpu}, {self.threads} thread(s), {self.repeats} paired rounds"
        console.print(where, highlight=False)


def bench(
    paths: Sequence[str | Path],
    *,
    baseline: str | Path | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 50,
    threads: int = 1,
    seed: int = 0,
) -> BenchReport:
    """Measure ONNX files side by side on seeded noise; ratios are against ``baseline``, which is measured too.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: numbers below 1 (``repeats`` below 5), or a batch size that a file of fixed batch cannot take.
    """
    if repeats < 5 or threads < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"need repeats >= 5, threads and batch sizes >= 1, got {repeats}, {threads}, {batch_sizes}")
    first = None if baseline is None else Path(baseline)
    files = list(dict.fromkeys([*([first] if first else []), *map(Path, paths)]))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file}")
    opened = [*files, first] if first else files  # the baseline once more: how far is a file from itself?
    sessions = [open_session(file, threads=threads) for file in opened]
    generator = np.random.default_rng(seed)
    rows: list[BenchRow] = []
    for size in batch_sizes:
        runs = [_runner(s, size, file, generator) for s, file in zip(sessions, opened, strict=True)]
        seconds = _measure(runs, repeats, generator)
        noise = _SESSION_NOISE
        if first is not None:
            itself = paired_ratio(seconds[files.index(first)], seconds[-1], generator)
            noise = max(noise, itself.high - 1, 1 / itself.low - 1)
        for index, file in enumerate(files):
            low, median, high = np.quantile(seconds[index], [0.25, 0.5, 0.75])
            ratio = None
            if first is not None and file != first:
                ratio = paired_ratio(seconds[files.index(first)], seconds[index], generator, noise=noise)
            rows.append(
                BenchRow(
                    path=file,
                    batch_size=size,
                    median=float(median),
                    quartiles=(float(low), float(high)),
                    ratio=ratio,
                )
            )
    return BenchReport(rows=tuple(rows), machine=this_machine(), threads=threads, repeats=repeats)


def paired_ratio(
    baseline: np.ndarray, other: np.ndarray, generator: np.random.Generator, *, noise: float = _SESSION_NOISE
) -> Ratio:
    """Speed of ``other`` relative to ``baseline`` from latencies [rounds] of the same rounds."""
    ratios = baseline / other
    draws = generator.integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Ratio(median=float(np.median(ratios)), low=float(low), high=float(high), noise=noise)


def _measure(runs: Sequence[Callable[[], object]], repeats: int, generator: np.random.Generator) -> np.ndarray:
    """Seconds a run, [files, rounds]."""
    for run in runs:
        for _ in range(_WARM_UP):
            run()
    # timings of equal length: a longer one would be struck by other work more often; the least of five is the quiet one
    loops = [max(1, round(_MIN_SECONDS / max(min(_timed(run, 3) for _ in range(5)), 1e-7))) for run in runs]
    seconds = np.empty((len(runs), repeats))
    for index in range(repeats):
        for which in generator.permutation(len(runs)):
            seconds[which, index] = _timed(runs[which], loops[which])
    return seconds


def _timed(run: Callable[[], object], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        run()
    return (time.perf_counter() - start) / loops


def _runner(session: Any, size: int, path: Path, generator: np.random.Generator) -> Callable[[], object]:
    feeds = {}
    for value in session.get_inputs():
        if value.type not in _TYPES:
            raise ValueError(f"{path.name}: cannot make up inputs of type {value.type}")
        fixed = value.shape[0]
        if isinstance(fixed, int) and fixed != size:
            raise ValueError(f"{path.name} takes batches of {fixed} only, not {size}")
        free = [axis for axis, length in enumerate(value.shape) if axis and not isinstance(length, int)]
        if free:
            raise ValueError(f"{path.name}: input {value.name} has free dimensions beside the batch: {value.shape}")
        noise = generator.standard_normal((size, *value.shape[1:]))
        feeds[value.name] = np.abs(noise).astype(_TYPES[value.type])
    return lambda: session.run(None, feeds)
