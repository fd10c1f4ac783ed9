"""From how many rows on 2:4 pays on one GPU: the table that `ovit bench --device cuda` writes. Needs no PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ovit_engine.analysis.bench_report import read_kind
from ovit_engine.analysis.paired import Ratio
from ovit_engine.certificate.sparse_cores import (
    SparseLayer,
)
from ovit_engine.utils.console import table_console
from ovit_engine.utils.files import atomic_write

if TYPE_CHECKING:
    from rich.console import Console


KIND = "ovit bench, 2:4 against dense on a GPU"

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ProductRow:
    """One product [rows, in] x [in, out] in one type; seconds a product, medians over rounds."""

    dtype: str
    out_features: int
    in_features: int
    rows: int
    dense: float | None = None
    dense_quartiles: tuple[float, float] | None = None
    sparse: float | None = None
    sparse_quartiles: tuple[float, float] | None = None
    # how many times faster the sparse product is
    ratio: Ratio | None = None
    # "graph": replayed from a CUDA graph, the GPU's time alone; "eager": with the launch by Python
    launch: str | None = None
    # why nothing was measured
    unsupported: str | None = None


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """The verdict on one weight in one type over all row counts that were measured."""

    dtype: str
    out_features: int
    in_features: int
    # the least number of rows at which 2:4 was faster, there and at all larger ones; None: at no such number
    rows: int | None
    # the row counts that were measured, in order
    measured: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SparseTable:
    """All that was measured on one GPU."""

    device: str
    capability: tuple[int, int]
    # what multiplied: cusparselt or cutlass
    backend: str
    versions: Mapping[str, str]
    date: str
    repeats: int
    rows: tuple[ProductRow, ...]

    @property
    def break_even(self) -> tuple[BreakEven, ...]:
        """One verdict a weight shape and type."""
        return find_break_even(self.rows)

    def lookup(self, out_features: int, in_features: int, rows: int, dtype: str) -> str | None:
        """What was measured about a product: "faster", "slower" or "within noise".

        A weight of another shape than those measured has no answer, and neither has a number of rows below the
        smallest or above the largest measured: nothing is guessed. Between two measured numbers the answer is theirs
        where they agree.
        """
        known = {
            row.rows: row.ratio.word
            for row in self.rows
            if (row.dtype, row.out_features, row.in_features) == (dtype, out_features, in_features) and row.ratio
        }
        below = [count for count in known if count <= rows]
        above = [count for count in known if count >= rows]
        if not below or not above:
            return None
        first, second = known[max(below)], known[min(above)]
        return first if first == second else None

    def verdict(self, out_features: int, in_features: int, dtype: str) -> BreakEven | None:
        """From how many rows on 2:4 pays for a weight of this shape; None where none such was measured."""
        key = (dtype, out_features, in_features)
        return next((e for e in self.break_even if (e.dtype, e.out_features, e.in_features) == key), None)

    def render(self, console: Console | None = None) -> None:
        """Print a table: in colour on a terminal, plain elsewhere."""

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for column in ("type", "out x in", "rows", "dense us", "2:4 us"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("2:4 against dense")
        for row in self.rows:
            cells = (row.dtype, f"{row.out_features}x{row.in_features}", str(row.rows))
            times = ("" if value is None else f"{value * 1e6:.2f}" for value in (row.dense, row.sparse))
            table.add_row(*cells, *times, row.unsupported if row.ratio is None else row.ratio.verdict)
        console = console or table_console()
        console.print(table)
        for even in self.break_even:
            console.print(f"{even.dtype} {even.out_features}x{even.in_features}: {spell(even)}", highlight=False)
        eager = sum(row.launch == "eager" for row in self.rows)
        if eager:
            line = f"{eager} of {len(self.rows)} products took no CUDA graph: their times hold the launch by Python"
            console.print(line, highlight=False)
        console.print(f"{self.device}, {self.backend}, {self.repeats} paired rounds", highlight=False)


def find_break_even(rows: Iterable[ProductRow]) -> tuple[BreakEven, ...]:
    """The least number of rows from which on the sparse product was faster at every number that was measured."""
    weights: dict[tuple[str, int, int], dict[int, bool]] = {}
    for row in rows:
        key = (row.dtype, row.out_features, row.in_features)
        if row.ratio is not None:
            weights.setdefault(key, {})[row.rows] = row.ratio.word == "faster"
    found = []
    for (dtype, out_features, in_features), faster in weights.items():
        least = None
        for count in sorted(faster, reverse=True):
            if not faster[count]:
                break
            least = count
        known = {"dtype": dtype, "out_features": out_features, "in_features": in_features}
        found.append(BreakEven(**known, rows=least, measured=tuple(sorted(faster))))  # type: ignore[arg-type]
    return tuple(found)


def spell(even: BreakEven) -> str:
    """A verdict in words."""
    span = f"{even.measured[0]} to {even.measured[-1]} rows were measured"
    if even.rows is None:
        return f"2:4 did not pay at the largest product ({span})"
    return f"2:4 is faster from {even.rows} rows on ({span})"


def write_table(table: SparseTable, path: Path) -> None:
    """Write the table as JSON, verdicts and break-even beside the figures. Raises OSError."""
    content = {"kind": KIND, "format": _FORMAT, **asdict(table)}
    for row, known in zip(table.rows, content["rows"], strict=True):
        known["verdict"] = None if row.ratio is None else row.ratio.verdict
    content["break_even"] = [asdict(even) for even in table.break_even]
    text = json.dumps(content, indent=2) + "\n"
    atomic_write(path, text)


def read_table(path: Path) -> SparseTable:
    """Read what `write_table` wrote; break-even is found anew from the figures.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: something else, or damaged; it names the file.
    """
    return read_kind(path, KIND, SparseTable, "table of ovit bench --device cuda")


def measured_pay(layer: SparseLayer, table: SparseTable) -> str:
    """Whether 2:4 paid for a weight of this shape and type when it was measured; nothing is guessed of other shapes."""
    even = table.verdict(layer.out, layer.k, "int8" if layer.weight in ("INT8", "UINT8") else "float16")
    return "-" if even is None else spell(even)
