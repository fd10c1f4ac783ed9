"""From how many rows on 2:4 is faster on one GPU: what `ovit bench --device cuda` writes. Needs no PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from ovit_engine.analysis.bench_report import read_kind, with_kind
from ovit_engine.certificate.ratio import Ratio
from ovit_engine.utils.console import table_console
from ovit_engine.utils.files import atomic_write

if TYPE_CHECKING:
    from rich.console import Console

KIND = "ovit bench, 2:4 against dense on a GPU"


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
    launch: Literal["graph", "eager"] | None = None
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

    def describe(self) -> str:
        """In one line."""
        span = f"{self.measured[0]} to {self.measured[-1]} rows were measured"
        if self.rows is None:
            return f"2:4 did not pay at the largest product ({span})"
        return f"2:4 is faster from {self.rows} rows on ({span})"


@dataclass(frozen=True, kw_only=True)
class SparseTable:
    """All that was measured on one GPU."""

    device: str
    capability: tuple[int, int]
    # what multiplied
    backend: Literal["cusparselt", "cutlass"]
    versions: Mapping[str, str]
    date: str
    repeats: int
    rows: tuple[ProductRow, ...]

    @property
    def break_even(self) -> tuple[BreakEven, ...]:
        """For each weight shape and type: from how many rows on the sparse product was faster wherever measured."""
        weights: dict[tuple[str, int, int], dict[int, bool]] = {}
        for row in self.rows:
            if row.ratio is not None:
                weight = weights.setdefault((row.dtype, row.out_features, row.in_features), {})
                weight[row.rows] = row.ratio.verdict == "faster"
        found = []
        for (dtype, out_features, in_features), faster in weights.items():
            counts = sorted(faster)
            last = max((index for index, count in enumerate(counts) if not faster[count]), default=-1)
            rows = counts[last + 1] if last + 1 < len(counts) else None
            shape = {"out_features": out_features, "in_features": in_features}
            found.append(BreakEven(dtype=dtype, **shape, rows=rows, measured=tuple(counts)))
        return tuple(found)

    def find(self, out_features: int, in_features: int, dtype: str) -> BreakEven | None:
        """Return the verdict on a weight of this shape and type; None if none such was measured: nothing is guessed."""
        key = (dtype, out_features, in_features)
        return next((e for e in self.break_even if (e.dtype, e.out_features, e.in_features) == key), None)

    def render(self, console: Console | None = None) -> None:
        """Print a table: in color on a terminal, plain elsewhere."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for column in ("type", "out x in", "rows", "dense us", "2:4 us"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("2:4 against dense")
        for row in self.rows:
            cells = (row.dtype, f"{row.out_features}x{row.in_features}", str(row.rows))
            times = ("" if value is None else f"{value * 1e6:.2f}" for value in (row.dense, row.sparse))
            table.add_row(*cells, *times, row.unsupported if row.ratio is None else row.ratio.describe())
        lines = [f"{each.dtype} {each.out_features}x{each.in_features}: {each.describe()}" for each in self.break_even]
        eager = sum(row.launch == "eager" for row in self.rows)
        if eager:
            products = f"{eager} of {len(self.rows)} products"
            lines.append(f"{products} took no CUDA graph: their times include the launch by Python")
        console = console or table_console()
        console.print(table)
        for line in (*lines, f"{self.device}, {self.backend}, {self.repeats} paired rounds"):
            console.print(line, highlight=False)


def write_table(table: SparseTable, path: Path) -> None:
    """Write the table as JSON, with verdicts and break-even. Raises OSError."""
    content = with_kind(KIND, table, table.rows) | {"break_even": [asdict(even) for even in table.break_even]}
    atomic_write(path, json.dumps(content, indent=2) + "\n")


def read_table(path: Path) -> SparseTable:
    """Read what `write_table` wrote; break-even is computed again. Raises as `read_kind`."""
    return read_kind(path, KIND, SparseTable, "table of ovit bench --device cuda")
