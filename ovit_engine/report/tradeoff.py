"""Accuracy over size and over latency: one point per measured model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ovit_engine.report.run_folder import OnnxFile, RunFolder
from ovit_engine.report.words import megabytes, percent
from ovit_engine.sweep.folder import FOLDER as SWEEP


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One model: its place and its name."""

    x: float
    y: float
    name: str


@dataclass(frozen=True, kw_only=True)
class SpotSeries:
    """Spots of one kind."""

    name: str
    spots: tuple[Spot, ...]
    # whether a line joins them: they come from one run
    joined: bool = False


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """A chart of series of spots."""

    title: str
    axis: str
    series: tuple[SpotSeries, ...]
    spell_x: Callable[[float], str]
    spell_y: Callable[[float], str]
    # a level across: (name, height)
    level: tuple[str, float] | None = None


def over_size(run: RunFolder) -> Scatter | None:
    """Return the metric over compressed bytes: the weights of sweep points, and ONNX files."""
    series = []
    if run.sweep is not None:
        spots = [
            Spot(x=point.gzip_bytes, y=point.metric, name=f"{percent(point.sparsity)} zeros")
            for point in run.sweep.points
            if point.metric is not None
        ]
        series.append(SpotSeries(name="weights of the sweep's checkpoints", spots=tuple(spots), joined=True))
    spots = [
        Spot(x=file.certificate.gzip_bytes, y=y, name=run.label(file))
        for file in run.files
        if (y := metric_of(run, file)) is not None
    ]
    series.append(SpotSeries(name="ONNX files", spots=tuple(spots)))
    return _scatter(run, "over size", "gzip", series, megabytes)


def over_latency(run: RunFolder) -> Scatter | None:
    """Return the metric over milliseconds per image, one series per batch size, of files with a known accuracy."""
    found: dict[str, list[Spot]] = {}
    for bench in run.benches:
        for row in bench.rows:
            file = run.file_of(row)
            y = None if file is None else metric_of(run, file)
            if file is None or y is None:
                continue
            name = f"batch {row.batch_size}, {bench.threads} thread{'s' * (bench.threads > 1)}"
            found.setdefault(name, []).append(Spot(x=1e3 * row.median / row.batch_size, y=y, name=run.label(file)))
    series = [SpotSeries(name=name, spots=tuple(spots)) for name, spots in found.items()]
    return _scatter(run, "over latency", "an image, median", series, lambda value: f"{value:.3g} ms")


def metric_of(run: RunFolder, file: OnnxFile) -> float | None:
    """Return the measured metric of a file: from its certificate, or from the sweep that exported it."""
    if file.certificate.accuracy is not None:
        return file.certificate.accuracy.file
    points = () if run.sweep is None else run.sweep.points
    return next((p.onnx_metric for p in points if run.path / SWEEP / str(p.onnx) == file.path), None)


def _scatter(
    run: RunFolder, what: str, axis: str, series: list[SpotSeries], spell: Callable[[float], str]
) -> Scatter | None:
    full = tuple(each for each in series if each.spots)
    if not full:
        return None
    level = None if run.sweep is None or run.sweep.baseline is None else ("dense", run.sweep.baseline)
    heights = [spot.y for each in full for spot in each.spots]
    share = all(0 <= y <= 1 for y in heights)
    return Scatter(
        title=f"{run.metric} {what}",
        axis=axis,
        series=full,
        spell_x=spell,
        spell_y=percent if share else lambda value: f"{value:.4g}",
        level=level,
    )
