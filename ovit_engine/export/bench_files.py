"""A bench on the disk: JSON that `ovit report` reads, CSV for spreadsheets, Markdown for a README."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from ovit_engine.export.bench_report import BenchReport, BenchRow
from ovit_engine.files import atomic_write

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
        content = _FORMATS[file.suffix](report).encode()
        atomic_write(file, lambda stream, content=content: stream.write(content))  # type: ignore[misc]
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
