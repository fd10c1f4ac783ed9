"""What a bench of ONNX files found, and how it reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ovit_engine.console import table_console
from ovit_engine.export.bench_conditions import Conditions
from ovit_engine.export.bench_paired import Ratio

if TYPE_CHECKING:
    from rich.console import Console

# half of the rounds lie further apart than this share of the median: on a quiet machine it is 1 to 4 %
_NOISY = 0.10


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

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a share of the median."""
        return (self.quartiles[1] - self.quartiles[0]) / self.median


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All rows, and where they were measured."""

    rows: tuple[BenchRow, ...]
    # what ratios are to; None where one file was measured
    baseline: Path | None
    threads: int
    repeats: int
    conditions: Conditions

    @property
    def labels(self) -> dict[Path, str]:
        """How a file is called in tables: by its name, or by its path where two have the same name."""
        paths = dict.fromkeys(row.path for row in self.rows)
        names = Counter(path.name for path in paths)
        return {path: path.name if names[path.name] == 1 else str(path) for path in paths}

    @property
    def where(self) -> str:
        """The line below a table."""
        rounds = f"{self.threads} thread{'s' * (self.threads > 1)}, {self.repeats} paired rounds"
        return f"{self.conditions.machine.cpu}, {rounds}, load {self.conditions.load_text}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes the numbers less certain."""
        worst = max(self.rows, key=lambda row: row.spread)
        if worst.spread <= _NOISY:
            return ()
        return (
            f"noisy machine: half of the rounds of {self.labels[worst.path]} at batch {worst.batch_size} lie "
            f"{worst.spread:.0%} of the median apart (quiet: below {_NOISY:.0%}); the intervals are wide for it",
        )

    def render(self, console: Console | None = None) -> None:
        """Print a table: in colour on a terminal, plain elsewhere."""
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("file")
        for column in ("batch", "ms", "quartiles", "images/s"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("" if self.baseline is None else f"against {self.labels[self.baseline]}")
        for row in self.rows:
            low, high = (value * 1e3 for value in row.quartiles)
            cells = (f"{row.median * 1e3:.3f}", f"{low:.3f}-{high:.3f}", f"{row.throughput:.0f}")
            verdict = "" if row.ratio is None else row.ratio.verdict
            table.add_row(self.labels[row.path], str(row.batch_size), *cells, verdict)
        console = console or table_console()
        console.print(table)
        console.print(self.where, highlight=False)
        for note in self.notes:
            console.print(f"note: {note}", style="yellow", highlight=False)
