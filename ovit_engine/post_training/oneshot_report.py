"""What a one-shot run found: as a table, CSV, JSON and a plot."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovit_engine.certificate.machine import this_machine, versions
from ovit_engine.core.recipe import Recipe
from ovit_engine.utils.files import atomic_write
from ovit_engine.utils.plots import plot_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


NAME = "oneshot"

# Options that concern all pruners alike stand once above the others.
COMMON = ("targets", "scope", "pattern")


@dataclass(frozen=True, kw_only=True)
class PrunedAccuracy:
    """One pruner at one sparsity. Shares are in [0, 1]."""

    pruner: str
    asked: float | None  # the sparsity that was asked for; None where the pattern implies it
    sparsity: float  # share of zeros in the targets, counted
    accuracy: float
    drop: float  # dense accuracy - accuracy
    flops_reduction: float | None  # of the whole model; None without example inputs
    seconds: float  # of the pruning step


@dataclass(frozen=True, kw_only=True)
class OneShot:
    """Accuracy over sparsity. `print` it, or `render()` it in colour; `save(folder)` writes all."""

    recipe: Recipe
    dense: float  # accuracy before pruning
    options: Mapping[str, Mapping[str, Any]]  # what each pruner ran with, defaults included
    points: tuple[PrunedAccuracy, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)  # model, data, seed ...: what the caller knows

    def render(self, console: "Console | None" = None) -> None:
        """Print the table and the options."""
        from rich.console import Console

        console = console or Console(highlight=False, soft_wrap=True)
        console.print(self._table())
        for line in self._used():
            console.print(line)

    def __str__(self) -> str:
        return as_text(self.render)

    def csv(self) -> str:
        """One line a point, the dense model first; sparsities, accuracies and reductions are shares."""
        rows = [{"pruner": "dense", "sparsity": 0.0, "accuracy": self.dense, "drop": 0.0, "flops_reduction": 0.0}]
        rows += [{**asdict(point), "options": json.dumps(self.options[point.pruner])} for point in self.points]
        return as_csv([*PrunedAccuracy.__dataclass_fields__, "options"], rows)

    def json(self) -> str:
        """All of it, with the recipe, versions and the machine."""
        found = {
            "dense": self.dense,
            "points": [asdict(point) for point in self.points],
            "options": {label: dict(options) for label, options in self.options.items()},
        }
        return as_json(self.recipe, self.about, found)

    def save(self, folder: Path) -> list[Path]:
        """Write oneshot.csv and oneshot.json to an existing folder, each whole; returns their paths."""
        return write_texts({folder / f"{NAME}.csv": self.csv(), folder / f"{NAME}.json": self.json()})

    def plot(self, folder: Path) -> list[Path]:
        """Write oneshot.svg and oneshot.png: accuracy over sparsity, a line a pruner, with the dense accuracy."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in self.points:
            lines.setdefault(point.pruner, []).append((point.sparsity, point.accuracy))
        return plot_lines(
            folder / NAME,
            lines,
            title=" ".join(["One-shot pruning", *(f"of {self.about[key]}" for key in ("model",) if key in self.about)]),
            x="sparsity of the pruned layers",
            y="accuracy",
            percent_x=True,
            percent_y=True,
            level=("dense", self.dense),
        )

    def _table(self) -> "Table":
        rows = [("dense", "", "", f"{self.dense:.2%}", "", "", "")]
        for point in self.points:
            asked = "implied" if point.asked is None else f"{100 * point.asked:g}%"
            flops = "" if point.flops_reduction is None else f"{point.flops_reduction:.1%}"
            drop = f"{100 * point.drop:.2f}"  # in percentage points
            measured = (f"{point.sparsity:.2%}", f"{point.accuracy:.2%}", drop, flops, f"{point.seconds:.1f}")
            rows.append((point.pruner, asked, *measured))
        header = ("pruner", "asked", "sparsity", "accuracy", "drop", "FLOP reduction", "seconds")
        return plain_table(header, rows)

    def _used(self) -> list[str]:
        """A line with what all had in common, and one a pruner."""
        first = next(iter(self.options.values()))
        common = [key for key in COMMON if all(options.get(key) == first.get(key) for options in self.options.values())]
        lines = [options_text({key: first[key] for key in common})] if common else []
        for label, options in self.options.items():
            own = {key: value for key, value in options.items() if key not in common}
            lines.append(f"{label}: {options_text(own) or 'no options of its own'}")
        return lines


def options_text(options: Mapping[str, Any]) -> str:
    """Options in one line: "block 192, damp 1e-08"."""
    return ", ".join(f"{key} {_value(value)}" for key, value in options.items())


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def plain_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> "Table":
    """A table without lines, names on the left and numbers on the right."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for index, column in enumerate(header):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def as_text(render: Any) -> str:
    """What `render(console)` prints, without colours."""
    from rich.console import Console

    stream = io.StringIO()
    render(Console(file=stream, highlight=False, soft_wrap=True, width=200))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def as_csv(columns: list[str], rows: list[dict[str, Any]]) -> str:
    """Lines of comma-separated values under a header; what a row lacks is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_json(recipe: Recipe, about: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Results with all that belongs to them: recipe and hash, what the caller knows, versions, machine."""
    document = {
        **about,
        **found,
        "recipe": recipe.dump(),
        "recipe_sha256": recipe.hash,
        "versions": versions(),
        "machine": this_machine().model_dump(mode="json"),
    }
    return json.dumps(document, indent=2) + "\n"


def write_texts(texts: Mapping[Path, str]) -> list[Path]:
    """Write each text to its file, whole or not at all."""
    for path, text in texts.items():
        atomic_write(path, text)
    return list(texts)
