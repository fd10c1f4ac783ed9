"""The course of a training over its epochs: what the recipe does when, the metric, loss, sparsity, learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ovit_engine.core.capabilities import Scheduled, having
from ovit_engine.core.modifier import Modifier
from ovit_engine.core.schedule import Clock
from ovit_engine.report.run_folder import RunFolder
from ovit_engine.report.words import percent

# (epoch, value)
Place = tuple[float, float]


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
    series: tuple[tuple[str, tuple[Place, ...]], ...]
    spell: Callable[[float], str]
    log: bool = False
    stairs: bool = False
    # the ends of the axis, where they do not follow the values
    span: Place | None = None


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What a run did and measured, over epochs from 0 to `last`."""

    lanes: tuple[Lane, ...]
    panels: tuple[Panel, ...]
    # when masks changed
    marks: tuple[float, ...]
    last: float


def lanes(modifiers: Sequence[Modifier], clock: Clock) -> tuple[Lane, ...]:
    """Return one lane per modifier; those without a schedule are omitted."""
    found = []
    for modifier in having(modifiers, Scheduled):
        rows = list(modifier.timeline(clock))
        if not rows:
            continue
        events = tuple((clock.epochs(step), words) for step, _, words in rows)
        last = rows[-1][0]
        ends = getattr(modifier, "end", None)
        if isinstance(ends, str):
            last = clock.steps(ends)
        elif last not in modifier.changes(clock):  # what does not end with a change lasts
            last = clock.total_steps
        found.append(Lane(name=modifier.name, start=events[0][0], end=clock.epochs(last), events=events))
    return tuple(found)


def panels(run: RunFolder) -> tuple[Panel, ...]:
    """Return the quantities that the run has measured."""
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


def timeline_of(run: RunFolder) -> Timeline | None:
    """Return what is to be drawn on one time axis; None if nothing was measured."""
    found = panels(run)
    if not found:
        return None
    clock = None if run.training is None else run.training.clock
    rows = lanes(run.recipe.modifiers, clock) if run.recipe is not None and clock is not None else ()
    epochs = [x for panel in found for _, points in panel.series for x, _ in points]
    ends = [] if clock is None else [clock.epochs(clock.total_steps)]
    steps = [] if run.training is None else [step for step, _, _ in run.training.sparsity_steps]
    marks = tuple(clock.epochs(step) for step in dict.fromkeys(steps)) if clock is not None else ()
    return Timeline(lanes=rows, panels=found, marks=marks, last=max([*epochs, *ends]))


def _metric_line(run: RunFolder) -> tuple[Place, ...]:
    """Return the metric at the steps where it was measured, also within an epoch."""
    if run.training is not None and run.measured:
        return tuple((run.training.clock.epochs(step), value) for step, value in run.measured)
    return tuple((float(row.epoch), row.accuracy) for row in run.epochs)


def _stairs(run: RunFolder) -> tuple[tuple[str, tuple[Place, ...]], ...]:
    if run.training is None or (run.epochs and _has_namesakes(run, run.training.sparsity_steps)):
        points = [(float(row.epoch), row.sparsity) for row in run.epochs]
        return (("sparsity", ((0.0, 0.0), *points)),) if any(y for _, y in points) else ()
    lines: dict[str, list[Place]] = {}
    for step, name, value in run.training.sparsity_steps:
        lines.setdefault(name, [(0.0, 0.0)]).append((run.training.clock.epochs(step), value))
    return tuple((name, tuple(points)) for name, points in lines.items())


def _has_namesakes(run: RunFolder, changes: Sequence[tuple[int, str, float]]) -> bool:
    """Return whether pruners of one name each report the sparsity of their own weights: these make no line."""
    pruners = {name for _, name, _ in changes}
    names = [] if run.recipe is None else [modifier.name for modifier in run.recipe.modifiers]
    return any(names.count(name) > 1 for name in pruners)
