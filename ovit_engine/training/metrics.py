"""What a training tells: a line an epoch in metrics.csv, and how far it is."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ovit_engine.utils.files import atomic_write
from ovit_engine.utils.progress import Progress

METRICS = "metrics.csv"


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """One line of metrics.csv."""

    epoch: int  # counts from 1
    loss: float  # mean training loss
    accuracy: float  # top-1 on the validation images, of the averaged copy where there is one
    lr: float  # of the first group, in the last step
    sparsity: float  # share of zeros in the weights that the recipe has masked so far
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TrainingListener:
    """What the trainer calls while it works; each function may do nothing."""

    begin: Callable[[int, int, int], None]  # (epoch, epochs, steps)
    step: Callable[[], None]
    end: Callable[[EpochMetrics], None]
    work: Progress | None = None  # inside a step; None: the run's own log
    resume: Callable[[Path], None] = lambda checkpoint: None  # the checkpoint fits: training goes on from it


SILENT = TrainingListener(begin=lambda epoch, epochs, steps: None, step=lambda: None, end=lambda metrics: None)


def write_metrics(folder: Path, metrics: Sequence[EpochMetrics]) -> None:
    """Write metrics.csv whole. Raises OSError."""
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(EpochMetrics)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, metrics))
    atomic_write(folder / METRICS, table.getvalue())
