"""What a bench of ONNX files found, and how it reads."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from ovit_engine.analysis.paired import Ratio
from ovit_engine.certificate.machine import Conditions
from ovit_engine.utils.console import table_console
from ovit_engine.utils.files import atomic_write

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


KIND = "ovit bench, ONNX Runtime on the CPU"

STEM = "bench"

_FORMAT = 1

Result = TypeVar("Result")


def to_json(report: BenchReport) -> str:
    """Everything measured, with the verdict beside each ratio."""
    content = {"kind": KIND, "format": _FORMAT, **asdict(report), "notes": report.notes}
    content["conditions"]["machine"] = report.conditions.machine.model_dump()
    for row, known in zip(report.rows, content["rows"], strict=True):
        known |= {"images_per_second": row.throughput, "verdict": None if row.ratio is None else row.ratio.verdict}
    return json.dumps(content, indent=2, default=str) + "\n"


def read_bench(path: Path) -> BenchReport:
    """Read what `to_json` wrote.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: something else, or damaged; it names the file.
    """
    return read_kind(path, KIND, BenchReport, "JSON of ovit bench")


def read_kind(path: Path, kind: str, result: type[Result], what: str) -> Result:
    """Read JSON that says of which kind it is, as a dataclass; raises as `read_bench` does, which calls it `what`."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("kind") != kind:
            raise ValueError(f"it does not say {kind!r}")
        return TypeAdapter(result).validate_python(content)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged, or no {what}: {_first_reason(error)}") from error


def _first_reason(error: ValueError) -> str:
    """The first thing that is wrong, in one line."""
    found: list[Any] = error.errors() if hasattr(error, "errors") else []
    if not found:
        return str(error).splitlines()[0]
    return f"{'.'.join(map(str, found[0]['loc']))}: {found[0]['msg']}"


def to_csv(report: BenchReport) -> str:
    """A line a row; times in milliseconds, ratios as times faster than the baseline."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    measured = ["file", "batch_size", "ms_median", "ms_q25", "ms_q75", "images_per_second"]
    writer.writerow([*measured, "baseline", "ratio", "ratio_low", "ratio_high", "verdict"])
    for row in report.rows:
        times = [f"{value * 1e3:.6g}" for value in (row.median, *row.quartiles)]
        ratio: list[Any] = [""] * 5
        if row.ratio is not None:
            bounds = [f"{value:.6g}" for value in (row.ratio.median, row.ratio.low, row.ratio.high)]
            ratio = [report.baseline, *bounds, row.ratio.verdict]
        writer.writerow([row.path, row.batch_size, *times, f"{row.throughput:.6g}", *ratio])
    return table.getvalue()


def to_markdown(report: BenchReport) -> str:
    """A table and the conditions below it."""
    against = "" if report.baseline is None else f"against {_cell(report.labels[report.baseline])}"
    lines = [f"| file | batch | ms (quartiles) | images/s | {against} |", "|---|---:|---:|---:|---|"]
    lines += [_line(report, row) for row in report.rows]
    packages = ", ".join(f"{name} {version}" for name, version in report.conditions.versions.items())
    lines += ["", f"{report.where}. {packages}. {report.conditions.date}."]
    lines += [line for note in report.notes for line in ("", f"Note: {note}.")]
    return "\n".join(lines) + "\n"


def write_bench(report: BenchReport, path: Path) -> list[Path]:
    """Write one file by its suffix, or all three into a folder.

    Returns:
        What was written.

    Raises:
        ValueError: a suffix of no format.
        OSError: the disk is full, or the place can't be written.
    """
    files = [path] if path.suffix else [path / f"{STEM}{suffix}" for suffix in _FORMATS]
    check_output(path)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        atomic_write(file, _FORMATS[file.suffix](report))
    return files


def check_output(path: Path) -> None:
    """Raise ValueError where `write_bench` could not tell the format: before minutes of measuring, not after."""
    if path.suffix not in ("", *_FORMATS):
        known = ", ".join(_FORMATS)
        raise ValueError(f"{path.name!r} ends in {path.suffix!r}: write a folder, or a file in {known}")


def _line(report: BenchReport, row: BenchRow) -> str:
    low, high = (value * 1e3 for value in row.quartiles)
    times = f"{row.median * 1e3:.3f} ({low:.3f}-{high:.3f})"
    verdict = "" if row.ratio is None else row.ratio.verdict
    return f"| {_cell(report.labels[row.path])} | {row.batch_size} | {times} | {row.throughput:.0f} | {verdict} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_FORMATS: dict[str, Callable[[BenchReport], str]] = {".json": to_json, ".csv": to_csv, ".md": to_markdown}
