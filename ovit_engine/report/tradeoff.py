"""Accuracy over size and over latency: what was measured, a point each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from ovit_engine.report import svg
from ovit_engine.report.gather import OnnxFile, RunFolder
from ovit_engine.report.svg import Axis
from ovit_engine.report.words import megabytes, percent
from ovit_engine.sweep.folder import FOLDER as SWEEP

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 20, 40, 44


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One model: where it lies, and what it is called."""

    x: float
    y: float
    name: str


@dataclass(frozen=True, kw_only=True)
class Series:
    """Spots of one kind."""

    name: str
    spots: tuple[Spot, ...]
    # whether they are stations of one way, so that a line between them means something
    joined: bool = False


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """A chart of series of spots."""

    title: str
    axis: str
    series: tuple[Series, ...]
    spell_x: Callable[[float], str]
    spell_y: Callable[[float], str]
    # a level across: (name, height)
    level: tuple[str, float] | None = None


def over_size(run: RunFolder) -> Scatter | None:
    """The metric over compressed bytes: the weights of sweep points, and ONNX files."""
    series = []
    if run.sweep is not None:
        spots = [
            Spot(x=point.gzip_bytes, y=point.metric, name=f"{percent(point.sparsity)} zeros")
            for point in run.sweep.points
            if point.metric is not None
        ]
        series.append(Series(name="weights of the sweep's checkpoints", spots=tuple(spots), joined=True))
    spots = [
        Spot(x=file.certificate.gzip_bytes, y=y, name=run.label(file))
        for file in run.files
        if (y := accuracy_of(run, file)) is not None
    ]
    series.append(Series(name="ONNX files", spots=tuple(spots)))
    return _scatter(run, "over size", "gzip", series, megabytes)


def over_latency(run: RunFolder) -> Scatter | None:
    """The metric over milliseconds an image, a series a batch size, of the files whose accuracy is known."""
    found: dict[str, list[Spot]] = {}
    for bench in run.benches:
        for row in bench.rows:
            file = run.file_of(row)
            y = None if file is None else accuracy_of(run, file)
            if file is None or y is None:
                continue
            name = f"batch {row.batch_size}, {bench.threads} thread{'s' * (bench.threads > 1)}"
            found.setdefault(name, []).append(Spot(x=1e3 * row.median / row.batch_size, y=y, name=run.label(file)))
    series = [Series(name=name, spots=tuple(spots)) for name, spots in found.items()]
    return _scatter(run, "over latency", "an image, median", series, lambda value: f"{value:.3g} ms")


def accuracy_of(run: RunFolder, file: OnnxFile) -> float | None:
    """The measured metric of a file: of its certificate, or else of the sweep that exported it."""
    if file.certificate.accuracy is not None:
        return file.certificate.accuracy.file
    points = () if run.sweep is None else run.sweep.points
    return next((p.onnx_metric for p in points if run.path / SWEEP / str(p.onnx) == file.path), None)


def _scatter(
    run: RunFolder, what: str, axis: str, series: list[Series], spell: Callable[[float], str]
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


def draw(chart: Scatter, width: float) -> ET.Element:
    """The chart, `width` pixels wide; sizes and times start at 0, so that distances are ratios."""
    spots = [spot for each in chart.series for spot in each.spots]
    legend = 16 * len(chart.series)
    height = 300 + legend
    drawing = svg.canvas(width, height, f"{chart.title}: {len(spots)} models", "scatter")
    across = Axis(low=0, high=max(spot.x for spot in spots) * 1.12, start=_LEFT, end=width - _RIGHT)
    low, high = svg.padded([spot.y for spot in spots] + ([chart.level[1]] if chart.level else []), 0.15)
    up = Axis(low=low, high=high, start=height - _BOTTOM, end=_TOP + legend)
    svg.text(drawing, (0, 14), chart.title, "title")
    svg.grid(drawing, across, up, svg.nice_ticks(low, high, 5), chart.spell_y)
    for value in svg.nice_ticks(0, across.high, 4 if width < 400 else 6):
        svg.text(drawing, (across.at(value), height - _BOTTOM + 18), chart.spell_x(value), "tick", "middle")
    svg.text(drawing, (across.end, height - 6), chart.axis, "tick", "end")
    if chart.level is not None:
        y = up.at(chart.level[1])
        svg.line(drawing, (across.start, y), (across.end, y), "level")
        svg.text(drawing, (across.end, y - 5), f"{chart.level[0]} {chart.spell_y(chart.level[1])}", "tick", "end")
    for index, each in enumerate(chart.series):
        svg.dot(drawing, (5, 28 + 16 * index), f"s{index % 6}", "", 4)
        svg.text(drawing, (15, 32 + 16 * index), each.name, "tick")
        placed = sorted((across.at(spot.x), up.at(spot.y)) for spot in each.spots)
        if each.joined:
            svg.path(drawing, placed, f"thin s{index % 6}")
        for spot in each.spots:  # the first series larger: what lies on it leaves a ring
            words = f"{spot.name}: {chart.spell_y(spot.y)}, {chart.spell_x(spot.x)}"
            svg.dot(drawing, (across.at(spot.x), up.at(spot.y)), f"s{index % 6}", words, 4 if index else 6)
    _draw_names(drawing, chart, across, up)
    return drawing


def _draw_names(drawing: ET.Element, chart: Scatter, across: Axis, up: Axis) -> None:
    """A name above or below each spot where nothing else is; the rest have theirs under the pointer."""
    placed = [(across.at(spot.x), up.at(spot.y), spot.name) for each in chart.series for spot in each.spots]
    taken = [(x - 6, x + 6, y - 6, y + 6) for x, y, _ in placed]
    seen: set[tuple[float, float, str]] = set()
    for x, y, name in reversed(placed):
        if (round(x), round(y), name) in seen:  # a checkpoint and its file
            continue
        seen.add((round(x), round(y), name))
        half = 3.1 * len(name)
        middle = min(max(x, across.start + half), across.end + _RIGHT - half)
        for base in (y - 9, y + 18):
            box = (middle - half, middle + half, base - 9, base + 2)
            if not any(_meet(box, other) for other in taken) and base < up.start:
                svg.text(drawing, (middle, base), name, "tick", "middle")
                taken.append(box)
                break


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes (left, right, top, bottom) overlap."""
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
