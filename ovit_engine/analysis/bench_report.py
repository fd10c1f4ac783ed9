"""What a bench of ONNX files found, and how it is printed and saved."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from ovit_engine.certificate.machine import Conditions
from ovit_engine.certificate.ratio import Ratio
from ovit_engine.utils.console import table_console
from ovit_engine.utils.files import atomic_write

if TYPE_CHECKING:
    from rich.console import Console

KIND = "ovit bench, ONNX Runtime on the CPU"

STEM = "bench"

_FORMAT = 2

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
    def headings(self) -> tuple[str, ...]:
        """Of the columns of `cells`."""
        against = "" if self.baseline is None else f"against {self.labels[self.baseline]}"
        return "file", "batch", "ms", "quartiles", "images/s", against

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """The table as text, a row a file and batch size."""
        found: list[tuple[str, ...]] = []
        for row in self.rows:
            times = f"{row.median * 1e3:.3f}", "-".join(f"{value * 1e3:.3f}" for value in row.quartiles)
            verdict = "" if row.ratio is None else row.ratio.describe()
            found.append((self.labels[row.path], str(row.batch_size), *times, f"{row.throughput:.0f}", verdict))
        return found

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
        """Print a table: in color on a terminal, plain elsewhere."""
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for heading in self.headings:
            is_number = heading in self.headings[1:-1]
            table.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number)
        for cells in self.cells:
            table.add_row(*cells)
        console = console or table_console()
        console.print(table)
        console.print(self.where, highlight=False)
        for note in self.notes:
            console.print(f"note: {note}", style="yellow", highlight=False)


Result = TypeVar("Result")


def with_kind(kind: str, report: Any, rows: Sequence[Any]) -> dict[str, Any]:
    """A report as what JSON holds: its kind and format, and a verdict in each row."""
    content = {"kind": kind, "format": _FORMAT, **TypeAdapter(type(report)).dump_python(report, mode="json")}
    for row, known in zip(rows, content["rows"], strict=True):
        known["verdict"] = None if row.ratio is None else row.ratio.verdict
    return content


def read_kind(path: Path, kind: str, result: type[Result], what: str) -> Result:
    """Read JSON of `with_kind` as a dataclass; errors call it `what`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is something else, or damaged; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("kind") != kind:
            raise ValueError(f"it does not say {kind!r}")
        return TypeAdapter(result).validate_python(content)
    except ValueError as error:
        errors: list[Any] = error.errors() if hasattr(error, "errors") else []
        where = "".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in errors[:1])
        reason = where or str(error).splitlines()[0]
        raise ValueError(f"{str(path)!r} is damaged, or no {what}: {reason}") from error


def read_bench(path: Path) -> BenchReport:
    """Read what `to_json` wrote; raises as `read_kind`."""
    return read_kind(path, KIND, BenchReport, "JSON of ovit bench")


def to_json(report: BenchReport) -> str:
    """Everything measured, with the verdict of each ratio."""
    content = with_kind(KIND, report, report.rows) | {"notes": report.notes}
    for row, known in zip(report.rows, content["rows"], strict=True):
        known["images_per_second"] = row.throughput
    return json.dumps(content, indent=2) + "\n"


def to_csv(report: BenchReport) -> str:
    """A line a row; times in milliseconds, ratios as times faster than the baseline."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    measured = ["file", "batch_size", "ms_median", "ms_q25", "ms_q75", "images_per_second"]
    writer.writerow([*measured, "baseline", "ratio", "ratio_low", "ratio_high", "verdict"])
    for row in report.rows:
        numbers = [f"{value:.6g}" for value in (*(t * 1e3 for t in (row.median, *row.quartiles)), row.throughput)]
        ratio: list[Any] = [""] * 5
        if row.ratio is not None:
            bounds = [f"{value:.6g}" for value in (row.ratio.median, row.ratio.low, row.ratio.high)]
            ratio = [report.baseline, *bounds, row.ratio.verdict]
        writer.writerow([row.path, row.batch_size, *numbers, *ratio])
    return table.getvalue()


def to_markdown(report: BenchReport) -> str:
    """A table and the conditions below it."""
    rows = [tuple(cell.replace("|", "\\|") for cell in cells) for cells in (report.headings, *report.cells)]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    lines.insert(1, "|---|---:|---:|---:|---:|---|")
    packages = ", ".join(f"{name} {version}" for name, version in report.conditions.versions.items())
    lines += ["", f"{report.where}. {packages}. {report.conditions.date}."]
    lines += [line for note in report.notes for line in ("", f"Note: {note}.")]
    return "\n".join(lines) + "\n"


_FORMATS: dict[str, Callable[[BenchReport], str]] = {".json": to_json, ".csv": to_csv, ".md": to_markdown}


def write_bench(report: BenchReport, path: Path) -> list[Path]:
    """Write one file by its suffix, or all three into a folder.

    Returns:
        What was written.

    Raises:
        ValueError: the suffix is of no known format.
        OSError: the disk is full, or the place can't be written.
    """
    check_output(path)
    files = [path] if path.suffix else [path / f"{STEM}{suffix}" for suffix in _FORMATS]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        atomic_write(file, _FORMATS[file.suffix](report))
    return files


def check_output(path: Path) -> None:
    """Raise ValueError if `write_bench` does not know the format: before minutes of measuring, not after."""
    if path.suffix not in ("", *_FORMATS):
        known = ", ".join(_FORMATS)
        raise ValueError(f"{path.name!r} ends in {path.suffix!r}: write a folder, or a file in {known}")
