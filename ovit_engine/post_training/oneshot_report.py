"""What a grid of one-shot runs found: as a table, CSV, JSON and a plot."""

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ovit_engine.certificate.machine import this_machine, versions
from ovit_engine.core.recipe import Recipe
from ovit_engine.utils.console import plain_table
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


class GridReport(ABC):
    """What a grid of one-shot runs found. `print` it, or `render()` it in color; `save(folder)` writes all."""

    name: ClassVar[str]  # of its files

    def render(self, console: "Console | None" = None) -> None:
        """Print the tables."""
        from rich.console import Console

        self.print_to(console or Console(highlight=False, markup=False, soft_wrap=True))

    def __str__(self) -> str:
        from rich.console import Console

        stream = io.StringIO()
        self.print_to(Console(file=stream, highlight=False, markup=False, soft_wrap=True, width=200))
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def save(self, folder: Path) -> list[Path]:
        """Write the CSV and the JSON file to an existing folder, each whole; return their paths."""
        texts = {folder / f"{self.name}.csv": self.csv(), folder / f"{self.name}.json": self.json()}
        for path, text in texts.items():
            atomic_write(path, text)
        return list(texts)

    @abstractmethod
    def print_to(self, console: "Console") -> None:
        """Print the tables to a console."""

    @abstractmethod
    def csv(self) -> str:
        """Return a line for each point of the grid."""

    @abstractmethod
    def json(self) -> str:
        """Return all of it, with the recipe, versions and the machine."""


Report = TypeVar("Report", bound=GridReport)


@dataclass(frozen=True, kw_only=True)
class GridStep(Generic[Report]):
    """Where a grid is, reported before each pruning step and after the last one."""

    what: str  # "ovit at 75%"
    done: int  # work so far, in gradients
    total: int
    result: Report  # what is known so far


@dataclass(frozen=True, kw_only=True)
class OneShot(GridReport):
    """Accuracy over sparsity, of one pruner or several."""

    name = NAME

    recipe: Recipe
    dense: float  # accuracy before pruning
    options: Mapping[str, Mapping[str, Any]]  # what each pruner ran with, defaults included
    points: tuple[PrunedAccuracy, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)  # model, data, seed ...: what the caller knows

    def print_to(self, console: "Console") -> None:
        console.print(self._table())
        for line in self._used():
            console.print(line)

    def csv(self) -> str:
        """Return one line a point, the dense model first; sparsities, accuracies and reductions are shares."""
        rows = [{"pruner": "dense", "sparsity": 0.0, "accuracy": self.dense, "drop": 0.0, "flops_reduction": 0.0}]
        rows += [{**asdict(point), "options": json.dumps(self.options[point.pruner])} for point in self.points]
        return as_csv([*PrunedAccuracy.__dataclass_fields__, "options"], rows)

    def json(self) -> str:
        found = {
            "dense": self.dense,
            "points": [asdict(point) for point in self.points],
            "options": {label: dict(options) for label, options in self.options.items()},
        }
        return as_json(self.recipe, self.about, found)

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
        return plain_table(header, rows, left=("pruner",))

    def _used(self) -> list[str]:
        """Return a line with what all had in common, and one a pruner."""
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


def as_csv(columns: list[str], rows: list[dict[str, Any]]) -> str:
    """Lines of comma-separated values under a header; what a row lacks is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_json(recipe: Recipe, about: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return results with all that belongs to them: recipe and hash, what the caller knows, versions, machine."""
    document = {
        **about,
        **found,
        "recipe": recipe.dump(),
        "recipe_sha256": recipe.hash,
        "versions": versions(),
        "machine": this_machine().model_dump(mode="json"),
    }
    return json.dumps(document, indent=2) + "\n"
