"""The course of a training over its epochs: what the recipe does when, the metric, loss, sparsity, learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from ovit_engine.core.modifier import Modifier
from ovit_engine.core.schedule import Clock
from ovit_engine.report import svg
from ovit_engine.report.gather import RunFolder
from ovit_engine.report.svg import Axis, Point
from ovit_engine.report.words import percent

_LEFT, _RIGHT, _GAP = 54, 14, 34
_LANE = 30
_MOST_DOTS = 80


@dataclass(frozen=True, kw_only=True)
class Lane:
    """When a modifier of the recipe acts; in epochs."""

    name: str
    start: float
    end: float
    # (epoch, what happens)
    events: tuple[tuple[float, str], ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One quantity over epochs."""

    title: str
    height: float
    # name of the line, its points, whether a value holds until the next
    series: tuple[tuple[str, tuple[Point, ...]], ...]
    spell: Callable[[float], str]
    log: bool = False
    stairs: bool = False
    # the ends of the axis, where they do not follow the values
    span: Point | None = None


def lanes(modifiers: Sequence[Modifier], clock: Clock) -> tuple[Lane, ...]:
    """What the recipe says, a lane a modifier; those without a time of their own are left out."""
    found = []
    for modifier in modifiers:
        rows = list(modifier.timeline(clock))
        if not rows:
            continue
        events = tuple((clock.epochs(step), words) for step, _, words in rows)
        last = rows[-1][0]
        ends = getattr(modifier, "end", None)
        if isinstance(ends, str):
            last = clock.steps(ends)
        elif rows[0][1] != "sparsity":  # what begins without an end lasts
            last = clock.total_steps
        found.append(Lane(name=modifier.name, start=events[0][0], end=clock.epochs(last), events=events))
    return tuple(found)


def panels(run: RunFolder) -> tuple[Panel, ...]:
    """The quantities that the run has measured."""
    found = []
    metric = _metric_line(run)
    if metric:
        share = all(0 <= value <= 1 for _, value in metric)
        words = percent if share else (lambda value: f"{value:.4g}")
        found.append(Panel(title=run.metric, height=130, series=((run.metric, metric),), spell=words))
    if run.epochs:
        loss = tuple((float(row.epoch), row.loss) for row in run.epochs)
        found.append(Panel(title="training loss", height=90, series=(("loss", loss),), spell=lambda v: f"{v:.3g}"))
    stairs = _stairs(run)
    if stairs:
        found.append(
            Panel(title="share of zeros", height=90, series=stairs, spell=percent, stairs=True, span=(0.0, 1.0))
        )
    rates = tuple((float(row.epoch), row.lr) for row in run.epochs if row.lr > 0)
    if rates:
        found.append(
            Panel(
                title="learning rate (end of epoch)",
                height=80,
                series=(("learning rate", rates),),
                spell=lambda value: f"{value:.0e}".replace("e-0", "e-"),
                log=max(y for _, y in rates) > 5 * min(y for _, y in rates),
            )
        )
    return tuple(found)


def draw(run: RunFolder, width: float) -> ET.Element | None:
    """All panels below each other on one time axis, `width` pixels wide; None where nothing was measured."""
    found = panels(run)
    if not found:
        return None
    clock = None if run.training is None else run.training.clock
    rows = lanes(run.recipe.modifiers, clock) if run.recipe is not None and clock is not None else ()
    epochs = [x for panel in found for _, points in panel.series for x, _ in points]
    last = max([*epochs, *([clock.epochs(clock.total_steps)] if clock else [])])
    across = Axis(low=0, high=last, start=_LEFT, end=width - _RIGHT)
    top = len(rows) * _LANE + (12 if rows else 0)
    height = top + sum(panel.height + _GAP for panel in found) + 24
    label = f"timeline of {last:g} epochs: {', '.join(panel.title for panel in found)}"
    drawing = svg.canvas(width, height, label, "timeline")
    _draw_marks(drawing, run, across, top, height - 24)
    for index, lane in enumerate(rows):
        _draw_lane(drawing, lane, across, index * _LANE)
    y = float(top)
    for panel in found:
        _draw_panel(drawing, panel, across, y)
        y += panel.height + _GAP
    for value in svg.nice_ticks(0, last, 6 if width < 500 else 12):
        svg.text(drawing, (across.at(value), height - 22), f"{value:g}", "tick", "middle")
    svg.text(drawing, (across.end, height - 6), "epochs", "tick", "end")
    return drawing


def _metric_line(run: RunFolder) -> tuple[Point, ...]:
    """The metric at the step where it was measured: also before a pruning step within an epoch."""
    if run.training is not None and run.measured:
        return tuple((run.training.clock.epochs(step), value) for step, value in run.measured)
    return tuple((float(row.epoch), row.accuracy) for row in run.epochs)


def _stairs(run: RunFolder) -> tuple[tuple[str, tuple[Point, ...]], ...]:
    if run.training is None or (run.epochs and _has_namesakes(run, run.training.sparsity_steps)):
        points = [(float(row.epoch), row.sparsity) for row in run.epochs]
        return (("sparsity", ((0.0, 0.0), *points)),) if any(y for _, y in points) else ()
    lines: dict[str, list[Point]] = {}
    for step, name, value in run.training.sparsity_steps:
        lines.setdefault(name, [(0.0, 0.0)]).append((run.training.clock.epochs(step), value))
    return tuple((name, tuple(points)) for name, points in lines.items())


def _has_namesakes(run: RunFolder, changes: Sequence[tuple[int, str, float]]) -> bool:
    """Whether pruners of one name each tell the sparsity of their own weights: together these make no line."""
    pruners = {name for _, name, _ in changes}
    names = [] if run.recipe is None else [modifier.name for modifier in run.recipe.modifiers]
    return any(names.count(name) > 1 for name in pruners)


def _draw_marks(drawing: ET.Element, run: RunFolder, across: Axis, top: float, bottom: float) -> None:
    """Hair lines at the pruning steps, through all panels."""
    if run.training is None:
        return
    for step, name, value in run.training.sparsity_steps:
        x = across.at(run.training.clock.epochs(step))
        svg.line(drawing, (x, top), (x, bottom), "event")
        svg.area(drawing, (x - 3, top), (6, bottom - top), "ghost", f"{name}: {percent(value)} zeros")


def _draw_lane(drawing: ET.Element, lane: Lane, across: Axis, y: float) -> None:
    start, end = across.at(lane.start), across.at(lane.end)
    # words begin where the bar does, as long as they end within the drawing
    room = len(lane.name) * 6.6
    svg.text(drawing, (max(_LEFT, min(start, across.end - room)), y + 11), lane.name, "lane")
    svg.area(drawing, (start, y + 16), (max(end - start, 3), 7), "bar", f"{lane.name}: {lane.start:g} to {lane.end:g}")
    for epoch, words in lane.events if len(lane.events) <= _MOST_DOTS else ():
        svg.dot(drawing, (across.at(epoch), y + 19.5), "mark", f"epoch {epoch:g}: {words}", 3.5)


def _draw_panel(drawing: ET.Element, panel: Panel, across: Axis, top: float) -> None:
    values = [y for _, points in panel.series for _, y in points]
    low, high = panel.span or ((min(values), max(values)) if panel.log else svg.padded(values))
    up = Axis(low=low, high=high, start=top + panel.height + 16, end=top + 22, log=panel.log)
    svg.text(drawing, (_LEFT, top + 12), panel.title, "title")
    ticks = svg.log_ticks(low, high, 4) if panel.log else svg.nice_ticks(low, high, 4)
    svg.grid(drawing, across, up, ticks, panel.spell)
    for index, (name, points) in enumerate(panel.series):
        placed = [(across.at(x), up.at(y)) for x, y in points]
        svg.path(drawing, svg.steps(placed, across.end) if panel.stairs else placed, f"s{index % 6}")
        if panel.stairs or len(points) > _MOST_DOTS:
            continue
        for (x, y), at in zip(points, placed, strict=True):
            svg.dot(drawing, at, f"s{index % 6}", f"epoch {x:g}: {name} {panel.spell(y)}", 2.5)
    if len(panel.series) > 1:
        _draw_names(drawing, [name for name, _ in panel.series], across, top + 12)


def _draw_names(drawing: ET.Element, names: Sequence[str], across: Axis, y: float) -> None:
    """A legend, from the right."""
    x = across.end
    for index in reversed(range(len(names))):
        svg.text(drawing, (x, y), names[index], f"tick s{index % 6}", "end")
        x -= len(names[index]) * 6.6 + 14
