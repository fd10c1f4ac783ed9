"""What to try next: rules over a run's folder. Each says what it saw; none predicts a result."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ovit_engine.core.loggers import sparsity_by
from ovit_engine.report.run_folder import RunFolder
from ovit_engine.report.words import percent, points
from ovit_engine.sweep.folder import point_name

# differences in accuracy that are worth a line
_LITTLE = 0.005
_MUCH = 0.02
_FEW_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A suggestion, and the measurement behind it."""

    what: str
    why: str
    # the command to run, if there is one
    command: str | None = None


def advise(run: RunFolder) -> tuple[Advice, ...]:
    """Return the advice of all rules, in the order of a user's work."""
    rules: tuple[Callable[[RunFolder], Iterable[Advice]], ...] = (
        _unfinished,
        _changed_files,
        _still_rising,
        _costly_step,
        _cliff,
        _no_cliff,
        _empty_layers,
        _not_exported,
        _few_images,
        _export_cost,
        _not_timed,
        _noisy,
        _no_gain,
        _two_of_four,
    )
    return tuple(advice for rule in rules for advice in rule(run))


def _unfinished(run: RunFolder) -> Iterator[Advice]:
    training = run.training
    if training is not None and not training.finished:
        done, total = training.step, training.clock.total_steps
        yield Advice(
            what="Finish the training.",
            why=f"The last checkpoint is of step {done} of {total}; a schedule that is cut off is not what was asked.",
            command=f"ovit train --resume {_quoted(run.path)}" if training.bundled else None,
        )


def _changed_files(run: RunFolder) -> Iterator[Advice]:
    for file in run.files:
        if file.unchanged is False:
            yield Advice(
                what=f"Don't ship {run.label(file)} before it is verified.",
                why="Its bytes are not those that its certificate was measured from.",
                command=f"ovit verify {_quoted(file.path)}",
            )


def _rise(run: RunFolder) -> tuple[float, int] | None:
    """Return how much accuracy rose over the last epochs, 0 if it was higher before; None if that cannot be told."""
    values = [row.accuracy for row in run.epochs]
    window = max(3, len(values) // 5)
    if len(values) < 2 * window:
        return None
    return (0.0 if values[-1] < max(values) else values[-1] - values[-1 - window]), window


def _still_rising(run: RunFolder) -> Iterator[Advice]:
    rise = _rise(run)
    if rise is None or rise[0] < _LITTLE or not _is_over(run):
        return
    why = f"Accuracy was highest in the last epoch, and rose by {points(rise[0])} over the last {rise[1]}."
    if run.sweep is not None and run.sweep.finished and run.sweep.points:
        sparsest = point_name(max(point.sparsity for point in run.sweep.points))
        command = f"ovit sweep {_quoted(run.path)} --continue {sparsest}"
        yield Advice(what="Train the pruned model further.", why=why, command=command)
    else:
        yield Advice(what="Train longer: more epochs after the last pruning step.", why=why)


def _costly_step(run: RunFolder) -> Iterator[Advice]:
    """Name the pruning step that cost most, if the loss was never recovered."""
    training = run.training
    if training is None or not run.measured or not training.finished or not _is_share(run):
        return
    found: list[tuple[float, int, float]] = []
    before: float | None = None
    pending: tuple[int, float] | None = None
    for step, name, value in training.history:
        if sparsity_by(name) is not None:
            pending = (step, value)
        elif name == run.metric:
            if pending is not None and before is not None:
                found.append((before - value, *pending))
            before, pending = value, None
    loss, step, sparsity = max(found, default=(0.0, 0, 0.0))
    below = max(value for _, value in run.measured) - run.measured[-1][1]
    if min(loss, below) >= _MUCH:
        yield Advice(
            what="Prune in smaller steps there, or leave more epochs after it.",
            why=f"The step to {percent(sparsity)} at epoch {training.clock.epochs(step):g} cost {points(loss)} of "
            f"{run.metric} until it was next measured, the most of all steps; the run ended {points(below)} below its "
            "best.",
        )


def _cliff(run: RunFolder) -> Iterator[Advice]:
    """Name the first step of the sweep that costs much."""
    for (sparsity, metric), (sparser, worse) in pairwise(_sweep_line(run)):
        if metric - worse >= _MUCH:
            yield Advice(
                what=f"Take the point at {percent(sparsity)}, or fine-tune the one at {percent(sparser)}.",
                why=f"Between them {run.metric} falls from {percent(metric)} to {percent(worse)}: "
                f"the first step of the sweep that costs {points(_MUCH)} or more.",
                command=f"ovit sweep {_quoted(run.path)} --continue {point_name(sparser)}",
            )
            return


def _no_cliff(run: RunFolder) -> Iterator[Advice]:
    """Tell a sweep that cost nothing, unless training was too short to tell: then its points differ in training too."""
    line = _sweep_line(run)
    if run.sweep is None or len(line) < 2 or not _is_over(run):
        return
    rise = _rise(run) if run.epochs else (0.0, 0)
    (least, first), (sparsest, last) = line[0], line[-1]
    lost = max(first, run.sweep.baseline or 0.0) - last
    if rise is not None and rise[0] < _LITTLE and abs(first - last) < 2 * _LITTLE and lost < _MUCH:
        yield Advice(
            what="Sweep to higher sparsities.",
            why=f"At {percent(sparsest)}, the sparsest point, {run.metric} is {percent(last)}, against "
            f"{percent(first)} at {percent(least)}: the sweep did not reach the place where it falls.",
        )


def _sweep_line(run: RunFolder) -> list[tuple[float, float]]:
    """Return (sparsity, metric) of the points of a sweep, if the metric is a share that should be high."""
    if run.sweep is None or not run.sweep.is_share:
        return []
    return sorted((point.sparsity, point.metric) for point in run.sweep.points if point.metric is not None)


def _empty_layers(run: RunFolder) -> Iterator[Advice]:
    empty = [layer.name for layer in run.layers if layer.sparsity >= 1]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        yield Advice(
            what="Leave the emptied layers out of the targets, or prune less.",
            why=f"Nothing is left of {empty[0]}{more}: the layer passes on its bias alone.",
        )


def _not_exported(run: RunFolder) -> Iterator[Advice]:
    if run.training is None or run.files or not run.training.finished:
        return
    file = run.path / "model.onnx"
    bundled = f"ovit export {_quoted(run.path)} --output {_quoted(file)}"
    yield Advice(
        what="Export a verified ONNX file.",
        why="The folder holds none: what would be deployed has not been measured.",
        command=bundled if run.training.bundled else f"engine.export({str(file)!r}, ...)",
    )


def _few_images(run: RunFolder) -> Iterator[Advice]:
    for file in run.files:
        parity = file.certificate.parity
        if parity.source == "random" or parity.images < _FEW_IMAGES:
            of = "random inputs, no real images" if parity.source == "random" else "images only"
            yield Advice(
                what="Export again with validation data (engine.export(..., data=loader)).",
                why=f"Parity of {run.label(file)} was measured on {parity.images} {of}.",
            )
            return


def _export_cost(run: RunFolder) -> Iterator[Advice]:
    """Name files that are worse than their PyTorch model."""
    for file in run.files:
        accuracy = file.certificate.accuracy
        if accuracy is not None and accuracy.pytorch - accuracy.file >= _LITTLE:
            yield Advice(
                what=f"Find out what {run.label(file)} lost.",
                why=f"It is right on {percent(accuracy.file)} of {accuracy.images} images, "
                f"{file.certificate.reference} on {percent(accuracy.pytorch)}.",
            )


def _not_timed(run: RunFolder) -> Iterator[Advice]:
    there = [file for file in run.files if file.unchanged is not None]
    if there and not run.benches:
        names = " ".join(_quoted(file.path) for file in there[:4])
        yield Advice(
            what="Measure latency, best against a dense file of the same model.",
            why="No bench is in the folder: whether any file is faster than another is not known.",
            command=f"ovit bench {names} --output {_quoted(run.path)}",
        )


def _noisy(run: RunFolder) -> Iterator[Advice]:
    notes = [note for bench in run.benches for note in bench.notes]
    if notes:
        yield Advice(what="Bench again on a quiet machine.", why=f"The bench said: {notes[0]}.")


def _no_gain(run: RunFolder) -> Iterator[Advice]:
    """Name a sparse float file that is not faster."""
    if any(file.certificate.int8_share for file in run.files):
        return
    for row in (row for bench in run.benches for row in bench.rows):
        file = run.file_of(row)
        if row.ratio is None or file is None or row.ratio.verdict == "faster" or not file.certificate.sparsity:
            continue
        yield Advice(
            what="Add quantize to the recipe, and bench the int8 file against this one.",
            why=f"{run.label(file)} is float with {percent(file.certificate.sparsity)} zeros, and the bench says "
            f"{row.ratio.describe()}: ONNX Runtime's CPU kernels compute with zeros as with any other number.",
        )
        return


def _two_of_four(run: RunFolder) -> Iterator[Advice]:
    file = next((file for file in run.files if file.unchanged is not None), None)
    if file is not None and not run.tables and any(layer.pattern == "2:4" for layer in run.layers):
        yield Advice(
            what="Measure on the GPU from which size on 2:4 pays.",
            why="The weights are 2:4, and no table of a GPU is in the folder: whether its kernels gain at these shapes "
            "is not known.",
            command=f"ovit bench --device cuda {_quoted(file.path)} --output {_quoted(run.path / 'break_even.json')}",
        )


def _is_over(run: RunFolder) -> bool:
    return run.training is None or run.training.finished


def _is_share(run: RunFolder) -> bool:
    """Return whether the metric rises to at most 1."""
    rises = run.sweep is None or run.sweep.best == "max"
    return rises and all(0 <= value <= 1 for _, value in run.measured)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
