"""What a training measures and reports: top-1 accuracy, a line for each epoch in metrics.csv, its progress."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ovit_engine.distributed.comm import SINGLE_PROCESS, Comm
from ovit_engine.utils.autograd import eval_mode
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


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[Any], device: torch.device, *, comm: Comm = SINGLE_PROCESS) -> float:
    """Return the top-1 accuracy in eval mode; the model's training flags are put back.

    Args:
        comm: processes that see a part of the images each, and then return the accuracy over all.
    """
    counts = torch.zeros(2, dtype=torch.long, device=device)  # right, all
    with eval_mode(model):
        for images, labels in loader:
            labels = labels.to(device)
            counts[0] += (model(images.to(device)).argmax(-1) == labels).sum()
            counts[1] += (labels >= 0).sum()  # less than zero: an unreadable image, for which another stands in
    right, count = comm.sum(counts).tolist()
    return float(right / count)
