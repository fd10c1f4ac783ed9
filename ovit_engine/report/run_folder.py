"""Read what runs leave in their folder: nothing is measured here, nothing needs a model."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ovit_engine.analysis.bench_report import KIND as BENCH
from ovit_engine.analysis.bench_report import BenchReport, BenchRow, read_bench
from ovit_engine.analysis.sparse_table import KIND as BREAK_EVEN
from ovit_engine.analysis.sparse_table import SparseTable, read_table
from ovit_engine.certificate.model import Certificate, certificate_path
from ovit_engine.core.loggers import sparsity_by
from ovit_engine.core.recipe import Recipe
from ovit_engine.core.schedule import Clock
from ovit_engine.sweep.folder import FOLDER as SWEEP
from ovit_engine.sweep.folder import INDEX, Index, read_index
from ovit_engine.utils.torch_files import load_file

CHECKPOINT = "last.pt"
METRICS = "metrics.csv"
_SUFFIX = ".certificate.json"

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """A line of metrics.csv."""

    epoch: int
    loss: float
    accuracy: float
    lr: float
    sparsity: float


@dataclass(frozen=True, kw_only=True)
class MaskedWeight:
    """How sparse a weight is."""

    name: str
    shape: tuple[int, ...]
    pattern: str
    sparsity: float

    @property
    def numel(self) -> int:
        """Return how many weights it has."""
        return prod(self.shape)

    @property
    def kept(self) -> int:
        """Return how many of them are not pruned."""
        return round(self.numel * (1 - self.sparsity))


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What the last checkpoint holds."""

    clock: Clock
    step: int
    finished: bool
    recipe_text: str
    # (step, name, value) in the order of time
    history: tuple[tuple[int, str, float], ...]
    # every weight that has a mask
    layers: tuple[MaskedWeight, ...]
    # whether ovit train wrote it, so that ovit train and export can read it; otherwise the user's own loop did
    bundled: bool = True

    @property
    def sparsity_steps(self) -> list[tuple[int, str, float]]:
        """Return (step, modifier, sparsity after it) of each change of masks."""
        named = ((step, sparsity_by(name), value) for step, name, value in self.history)
        return [(step, modifier, value) for step, modifier, value in named if modifier is not None]


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """An exported file and what its certificate says."""

    path: Path
    certificate: Certificate
    # whether the file has the bytes that the certificate was measured from; None: the file is gone
    unchanged: bool | None


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What was found in a run's folder."""

    path: Path
    recipe: Recipe | None = None
    training: TrainingRecord | None = None
    epochs: tuple[Epoch, ...] = ()
    sweep: Index | None = None
    files: tuple[OnnxFile, ...] = ()
    benches: tuple[BenchReport, ...] = ()
    tables: tuple[SparseTable, ...] = ()
    # files that are there and could not be read
    problems: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """Return the name of the metric."""
        return self.sweep.metric if self.sweep is not None else "accuracy"

    @property
    def measured(self) -> list[tuple[int, float]]:
        """Return (step, value) of the metric, in the order of time."""
        history = () if self.training is None else self.training.history
        return [(step, value) for step, name, value in history if name == self.metric]

    @property
    def layers(self) -> tuple[MaskedWeight, ...]:
        """Return the sparsity of each weight: from the last checkpoint, or from the first file."""
        if self.training is not None:
            return self.training.layers
        for file in self.files:
            patterns = {layer.name: _pattern(layer.pattern) for layer in file.certificate.promise.layers if layer.zeros}
            found = [layer for layer in file.certificate.layers if layer.name in patterns]
            if found:
                return tuple(
                    MaskedWeight(name=each.name, shape=each.shape, pattern=patterns[each.name], sparsity=each.sparsity)
                    for each in found
                )
        return ()

    def label(self, file: OnnxFile) -> str:
        """Return a file's name on the page, with its folder if it lies elsewhere."""
        try:
            return file.path.relative_to(self.path).as_posix()
        except ValueError:
            return str(file.path)

    def file_of(self, row: BenchRow) -> OnnxFile | None:
        """Return the file that a row of a bench measured, if that is certain."""
        named = [file for file in self.files if file.path.name == row.path.name]
        same = [file for file in named if file.path.resolve() == row.path.resolve()]
        return same[0] if same else named[0] if len(named) == 1 else None


class _Reader:
    """Reads files; a damaged one becomes a line in `problems`."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def __call__(self, read: Callable[[S], T], source: S | None) -> T | None:
        """Return what `read(source)` returns; None if there is no source, or a damaged one."""
        try:
            return None if source is None else read(source)
        except (ValueError, OSError, KeyError, TypeError) as error:
            self.problems.append(" ".join(str(error).split()) or type(error).__name__)
            return None


def read_run(
    folder: Path, *, checkpoint: Path | None = None, onnx: Iterable[Path] = (), benches: Iterable[Path] = ()
) -> RunFolder:
    """Read the folder of a run, and files that lie elsewhere.

    Args:
        folder: of `ovit train`, or any other with checkpoints, a sweep, certificates or benches.
        checkpoint: the state of the run that is read; by default the last one in the folder.
        onnx: exported files elsewhere, their certificates beside them.
        benches: JSON files of `ovit bench` elsewhere.

    Raises:
        FileNotFoundError: no such folder, or a file that was named is not there.
        ValueError: nothing to report on, or a file that was named can't be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}")
    tried = _Reader()
    training = tried(_read_training, checkpoint or _checkpoint(folder))
    text = None if training is None else training.recipe_text
    certificates = sorted(folder.glob(f"*{_SUFFIX}")) + sorted((folder / SWEEP).glob(f"*{_SUFFIX}"))
    named = [certificate_path(path) for path in dict.fromkeys(onnx)]
    files = [tried(_read_file, path) for path in certificates if path not in named] + [
        _read_file(path) for path in named
    ]
    benched = _read_benches(folder, list(benches), tried)
    found = RunFolder(
        path=folder,
        recipe=tried(lambda text: Recipe.parse(text, file=f"recipe in {folder}"), text),
        training=training,
        epochs=tried(_read_metrics, _existing(folder / METRICS)) or (),
        sweep=tried(lambda index: read_index(index.parent), _existing(folder / SWEEP / INDEX)),
        files=tuple(file for file in files if file is not None),
        benches=tuple(each for each in benched if isinstance(each, BenchReport)),
        tables=tuple(each for each in benched if isinstance(each, SparseTable)),
        problems=tuple(tried.problems),
    )
    if not (found.training or found.epochs or found.sweep or found.files or found.benches or found.tables):
        why = f": {found.problems[0]}" if found.problems else ""
        raise ValueError(
            f"nothing to report on in {str(folder)!r}: no {CHECKPOINT}, {METRICS}, {SWEEP}/{INDEX}, certificate or "
            f"bench that can be read{why}"
        )
    return found


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _checkpoint(folder: Path) -> Path | None:
    """Return the newest state of a run: its last checkpoint, or a point of its sweep."""
    points = (folder / SWEEP).glob("*.pt")
    return _existing(folder / CHECKPOINT) or max(points, key=lambda path: path.stat().st_mtime, default=None)


def _read_training(path: Path) -> TrainingRecord:
    content = load_file(path, lazily=True)
    try:
        engine, bundled = content["engine"], "data" in content
        # a user's own loop may save last between the last step and engine.detach()
        over = engine["step"] >= engine["total_steps"] and not bundled
        return TrainingRecord(
            clock=Clock(engine["steps_per_epoch"], engine["total_steps"]),
            step=engine["step"],
            finished=bool(engine["finished"]) or over,
            recipe_text=engine["recipe"],
            history=tuple((int(step), str(name), float(value)) for step, name, value in engine["history"]),
            layers=tuple(_read_mask(name, packed) for name, packed in engine["masks"].items()),
            bundled=bundled,
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is no checkpoint of a run: {type(error).__name__} {error}") from error


def _read_mask(name: str, packed: Mapping[str, Any]) -> MaskedWeight:
    import numpy as np

    shape = tuple(int(size) for size in packed["shape"])
    kept = int(np.unpackbits(packed["bits"].numpy(), count=prod(shape)).sum())
    return MaskedWeight(name=name, shape=shape, pattern=_pattern(packed["pattern"]), sparsity=1 - kept / prod(shape))


def _pattern(spelling: str | Mapping[str, Any]) -> str:
    return spelling if isinstance(spelling, str) else f"block {'x'.join(map(str, spelling['block']))}"


def _read_metrics(path: Path) -> tuple[Epoch, ...]:
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        return TypeAdapter(tuple[Epoch, ...]).validate_python(rows)
    except ValidationError as error:
        row, *column = error.errors()[0]["loc"]
        what = f"row {row}, {' '.join(map(str, column))}: {error.errors()[0]['msg']}"
        raise ValueError(f"{str(path)!r} is damaged, or no metrics of a run: {what}") from error


def _read_file(certificate: Path) -> OnnxFile:
    """Read an exported file by its certificate."""
    path = certificate.with_name(certificate.name.removesuffix(_SUFFIX) + ".onnx")
    if not certificate.is_file():
        raise FileNotFoundError(f"no certificate {str(certificate)!r} beside {path.name}")
    try:
        facts = Certificate.from_json(certificate.read_text(encoding="utf-8"))
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{str(certificate)!r} is damaged, or of another version: {first}") from error
    unchanged = hashlib.sha256(path.read_bytes()).hexdigest() == facts.sha256 if path.is_file() else None
    return OnnxFile(path=path, certificate=facts, unchanged=unchanged)


def _read_benches(folder: Path, named: list[Path], tried: _Reader) -> list[BenchReport | SparseTable | None]:
    readers: dict[str | None, Callable[[Path], BenchReport | SparseTable]]
    readers = {BENCH: read_bench, BREAK_EVEN: read_table}
    there = [path for path in sorted(folder.glob("*.json")) if path not in named and _kind(path) in readers]
    found = [tried(readers[_kind(path)], path) for path in there]
    return found + [readers.get(_kind(path), read_bench)(path) for path in dict.fromkeys(named)]


def _kind(path: Path) -> str | None:
    """Return what a JSON file says it is."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = content.get("kind") if isinstance(content, dict) else None
    return kind if isinstance(kind, str) else None
