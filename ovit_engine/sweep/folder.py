"""What a sweep leaves on the disk: a checkpoint a point, `sweep.json`, and a plot of the metric over size."""

import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ovit_engine.utils.files import atomic_write

log = logging.getLogger(__name__)

FOLDER = "sweep"  # in the output folder of a run

INDEX = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class Point:
    """The model that a sweep kept at one sparsity."""

    sparsity: float  # as asked
    measured: float  # share of zeros in the targets of the sweep's pruner
    step: int  # at which it was kept
    epoch: float
    metric: float | None  # None: the last model before the next change, as none was reported
    checkpoint: str  # the file's name in the sweep's folder
    bytes: int  # of the weights
    gzip_bytes: int  # of the weights, compressed: what zeros save on a disk and on the way to it
    parameters: int
    parameters_left: int  # without the pruned ones
    flop_reduction: float | None = None  # dense over sparse; None where the inputs are not known
    onnx: str | None = None  # the file's name in the sweep's folder
    onnx_bytes: int | None = None
    onnx_gzip_bytes: int | None = None
    onnx_metric: float | None = None  # accuracy of the file


@dataclass(frozen=True, kw_only=True)
class Index:
    """All of `sweep.json`."""

    recipe: str
    recipe_hash: str
    asked: tuple[float, ...]  # sparsities, with those that have no point yet
    metric: str
    best: Literal["max", "min"]
    onnx: bool  # whether the recipe asks for it
    finished: bool
    baseline: float | None  # the metric of the dense model, where it is known
    points: tuple[Point, ...]

    @property
    def is_share(self) -> bool:
        """Whether the metric is written in percent, as an accuracy is."""
        return self.best == "max" and all(0 <= point.metric <= 1 for point in self.points if point.metric is not None)


def point_name(sparsity: float) -> str:
    """The name of a point, of which its files' names are made: 0.75."""
    return f"{sparsity:.12g}"


def write_index(folder: Path, index: Index) -> None:
    """Write `sweep.json` whole. Raises OSError."""
    text = json.dumps(asdict(index), indent=1) + "\n"
    atomic_write(folder / INDEX, text)


def read_index(folder: Path) -> Index:
    """Read `sweep.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none of ours.
    """
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"no sweep in {str(folder.parent)!r}: a recipe with 'sweep' in its pruner leaves one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        points = tuple(Point(**point) for point in content.pop("points"))
        return Index(**{**content, "asked": tuple(content["asked"])}, points=points)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is damaged, or no index of a sweep: {error}") from error


def weigh(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Bytes of tensors as they are, and compressed as gzip does by default."""
    raw = packed = 0
    stream = zlib.compressobj(wbits=31)
    for tensor in tensors:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        raw += content.size
        packed += len(stream.compress(content.data))
    return raw, packed + len(stream.flush())


def draw(folder: Path, index: Index) -> list[Path]:
    """Plot the metric of each point over its compressed size; nothing where no metric was reported."""
    line = [(point.gzip_bytes / 1e6, point.metric) for point in index.points if point.metric is not None]
    if not line:
        return []
    from ovit_engine.utils.plots import plot_lines

    return plot_lines(
        folder / f"{index.metric.replace('/', '_')}_over_size",
        {index.recipe: line},
        title=f"{index.recipe}: {index.metric} over size",
        x="weights, compressed (MB)",
        y=index.metric,
        percent_y=index.is_share,
        level=None if index.baseline is None else ("dense", index.baseline),
    )


def is_of(content: Mapping[str, Any], recipe_hash: str, total_steps: int) -> bool:
    """Whether what was read from a point's file came from a training under this recipe, of this length."""
    engine = content.get("engine", {})
    return bool(engine.get("recipe_hash") == recipe_hash and engine.get("total_steps") == total_steps)
