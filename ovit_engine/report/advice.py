"""What to try next: rules over a run's folder. Each says what it saw; none predicts a result."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ovit_engine.core.loggers import sparsity_by
from ovit_engine.report.run_folder import OnnxFile, RunFolder
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
    rules: tuple[Callable[[RunFolder], list[Advice]], ...] = (
        _unfinished,
        _changed_files,
        _still_rising,
        _costly_step,
        _sweep,
        _empty_layers,
        _not_exported,
        _not_measured,
        _export_cost,
        _not_timed,
        _noisy,
        _no_gain,
        _two_of_four,
    )
    return tuple(advice for rule in rules for advice in rule(run))


def _unfinished(run: RunFolder) -> list[Advice]:
    training = run.training
    if training is None or training.finished:
        return []
    done, total = training.step, training.clock.total_steps
    return [
        Advice(
            what="Finish the training.",
            why=f"The last checkpoint is of step {done} of {total}; a schedule that is cut off is not what was asked.",
            command=f"ovit train --resume {_quoted(run.path)}" if training.bundled else None,
        )
    ]


def _changed_files(run: RunFolder) -> list[Advice]:
    return [
        Advice(
            what=f"Don't ship {run.label(file)} before it is verified.",
            why="Its bytes are not those that its certificate was measured from.",
            command=f"ovit verify {_quoted(file.path)}",
        )
        for file in run.files
        if file.unchanged is False
    ]


def _still_rising(run: RunFolder) -> list[Advice]:
    values = [row.accuracy for row in run.epochs]
    window = max(3, len(values) // 5)
    if len(values) < 2 * window or (run.training is not None and not run.training.finished):
        return []
    gain = values[-1] - values[-1 - window]
    if values[-1] < max(values) or gain < _LITTLE:
        return []
    why = f"Accuracy was highest in the last epoch, and rose by {points(gain)} over the last {window}."
    if run.sweep is not None and run.sweep.finished and run.sweep.points:
        sparsest = point_name(max(point.sparsity for point in run.sweep.points))
        command = f"ovit sweep {_quoted(run.path)} --continue {sparsest}"
        return [Advice(what="Train the pruned model further.", why=why, command=command)]
    return [Advice(what="Train longer: more epochs after the last pruning step.", why=why)]


def _costly_step(run: RunFolder) -> list[Advice]:
    """Name the pruning step that cost most, if the loss was never recovered."""
    training = run.training
    if training is None or not run.measured or not training.finished or not _is_share(run):
        return []
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
    final, best = run.measured[-1][1], max(value for _, value in run.measured)
    if not found or best - final < _MUCH:
        return []
    loss, step, sparsity = max(found)
    if loss < _MUCH:
        return []
    epoch = training.clock.epochs(step)
    return [
        Advice(
            what="Prune in smaller steps there, or leave more epochs after it.",
            why=f"The step to {percent(sparsity)} at epoch {epoch:g} cost {points(loss)} of {run.metric} until it was "
            f"next measured, the most of all steps; the run ended {points(best - final)} below its best.",
        )
    ]


def _sweep(run: RunFolder) -> list[Advice]:
    if run.sweep is None or not run.sweep.is_share:
        return []
    known = sorted((p.sparsity, p.metric) for p in run.sweep.points if p.metric is not None)
    if len(known) < 2:
        return []
    folder = _quoted(run.path)
    for (sparsity, metric), (sparser, worse) in pairwise(known):
        if metric - worse >= _MUCH:
            return [
                Advice(
                    what=f"Take the point at {percent(sparsity)}, or fine-tune the one at {percent(sparser)}.",
                    why=f"Between them {run.sweep.metric} falls from {percent(metric)} to {percent(worse)}: "
                    f"the first step of the sweep that costs {points(_MUCH)} or more.",
                    command=f"ovit sweep {folder} --continue {point_name(sparser)}",
                )
            ]
    (_, first), (sparsest, last) = known[0], known[-1]
    if first - last < 2 * _LITTLE:
        return [
            Advice(
                what="Sweep to higher sparsities.",
                why=f"At {percent(sparsest)}, the sparsest point, {run.sweep.metric} is {percent(last)}, against "
                f"{percent(first)} at {percent(known[0][0])}: the sweep did not reach the place where it falls.",
            )
        ]
    return []


def _empty_layers(run: RunFolder) -> list[Advice]:
    empty = [layer.name for layer in run.layers if layer.sparsity >= 1]
    if not empty:
        return []
    more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
    return [
        Advice(
            what="Leave the emptied layers out of the targets, or prune less.",
            why=f"Nothing is left of {empty[0]}{more}: the layer passes on its bias alone.",
        )
    ]


def _not_exported(run: RunFolder) -> list[Advice]:
    if run.files or run.training is None or not run.training.finished:
        return []
    return [
        Advice(
            what="Export a verified ONNX file.",
            why="The folder holds none: what would be deployed has not been measured.",
            command=f"ovit export {_quoted(run.path)} --output {_quoted(run.path / 'model.onnx')}"
            if run.training.bundled
            else f"engine.export({str(run.path / 'model.onnx')!r}, ...)",
        )
    ]


def _not_measured(run: RunFolder) -> list[Advice]:
    found = []
    for file in run.files:
        parity = file.certificate.parity
        if parity.source == "random":
            why = f"Parity of {run.label(file)} was measured on {parity.images} random inputs, no real images."
        elif parity.images < _FEW_IMAGES:
            why = f"Parity of {run.label(file)} was measured on {parity.images} images only."
        else:
            continue
        found.append(Advice(what="Export again with validation data (engine.export(..., data=loader)).", why=why))
    return found[:1]


def _export_cost(run: RunFolder) -> list[Advice]:
    """Name files that are worse than their PyTorch model."""
    found = []
    for file in run.files:
        accuracy = file.certificate.accuracy
        if accuracy is not None and accuracy.pytorch - accuracy.file >= _LITTLE:
            found.append(
                Advice(
                    what=f"Find out what {run.label(file)} lost.",
                    why=f"It is right on {percent(accuracy.file)} of {accuracy.images} images, "
                    f"{file.certificate.reference} on {percent(accuracy.pytorch)}.",
                )
            )
    return found


def _not_timed(run: RunFolder) -> list[Advice]:
    there = [file for file in run.files if file.unchanged is not None]
    if run.benches or not there:
        return []
    names = " ".join(_quoted(file.path) for file in there[:4])
    return [
        Advice(
            what="Measure latency, best against a dense file of the same model.",
            why="No bench is in the folder: whether any file is faster than another is not known.",
            command=f"ovit bench {names} --output {_quoted(run.path)}",
        )
    ]


def _noisy(run: RunFolder) -> list[Advice]:
    notes = [note for bench in run.benches for note in bench.notes]
    if not notes:
        return []
    return [Advice(what="Bench again on a quiet machine.", why=f"The bench said: {notes[0]}.")]


def _no_gain(run: RunFolder) -> list[Advice]:
    """Name a sparse float file that is not faster."""
    if any(file.certificate.int8_share for file in run.files):
        return []
    for bench in run.benches:
        for row in bench.rows:
            file = run.file_of(row)
            if row.ratio is None or file is None or row.ratio.verdict == "faster":
                continue
            if file.certificate.sparsity > 0:
                return [_zeros_alone(run, file, row.ratio.describe())]
    return []


def _zeros_alone(run: RunFolder, file: OnnxFile, verdict: str) -> Advice:
    return Advice(
        what="Add quantize to the recipe, and bench the int8 file against this one.",
        why=f"{run.label(file)} is float with {percent(file.certificate.sparsity)} zeros, and the bench says "
        f"{verdict}: ONNX Runtime's CPU kernels compute with zeros as with any other number.",
    )


def _two_of_four(run: RunFolder) -> list[Advice]:
    if run.tables or not any(layer.pattern == "2:4" for layer in run.layers):
        return []
    file = next((file for file in run.files if file.unchanged is not None), None)
    if file is None:
        return []
    return [
        Advice(
            what="Measure on the GPU from which size on 2:4 pays.",
            why="The weights are 2:4, and no table of a GPU is in the folder: whether its kernels gain at these shapes "
            "is not known.",
            command=f"ovit bench --device cuda {_quoted(file.path)} --output {_quoted(run.path / 'break_even.json')}",
        )
    ]


def _is_share(run: RunFolder) -> bool:
    """Return whether the metric rises to at most 1."""
    rises = run.sweep is None or run.sweep.best == "max"
    return rises and all(0 <= value <= 1 for _, value in run.measured)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
