"""Axes, ticks and marks as SVG elements: colours are classes of the page, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; a logarithmic axis takes positive ones only."""
        low, high, here = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (here - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, for `most` >= 2."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if _count(low, high, factor * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, first + _count(low, high, step))]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten between positive numbers, thinned to at most `most`; the ends where there is none."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = list(range(first, last + 1))
    if not powers:
        return [low, high] if high > low else [low]
    stride = math.ceil(len(powers) / most)
    return [10.0**power for power in powers[::-stride]][::-1]


def _count(low: float, high: float, step: float) -> int:
    return math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9) + 1


def padded(values: Iterable[float], share: float = 0.08) -> tuple[float, float]:
    """The range of values with some room on both sides."""
    found = list(values)
    low, high = min(found), max(found)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def canvas(width: float, height: float, label: str, name: str) -> ET.Element:
    """An empty drawing; `label` is what a screen reader says, `name` its class."""
    box = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    return ET.Element("svg", {**box, "role": "img", "aria-label": label, "class": name})


def text(parent: ET.Element, at: Point, words: str, name: str = "", anchor: str = "start") -> None:
    """Words at a point of their baseline."""
    where = {"x": f"{at[0]:.1f}", "y": f"{at[1]:.1f}", "text-anchor": anchor}
    ET.SubElement(parent, "text", {**where, **({"class": name} if name else {})}).text = words


def line(parent: ET.Element, first: Point, last: Point, name: str) -> None:
    """A straight line."""
    ends = zip(("x1", "y1", "x2", "y2"), (*first, *last), strict=True)
    ET.SubElement(parent, "line", {**{key: f"{value:.1f}" for key, value in ends}, "class": name})


def path(parent: ET.Element, points: Sequence[Point], name: str) -> None:
    """A line through points."""
    ET.SubElement(
        parent, "polyline", {"points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points), "class": f"path {name}"}
    )


def area(parent: ET.Element, at: Point, size: Point, name: str, title: str = "") -> None:
    """A rectangle; its title is shown where a pointer rests on it."""
    box = {"x": at[0], "y": at[1], "width": max(size[0], 0.0), "height": max(size[1], 0.0)}
    found = ET.SubElement(parent, "rect", {**{key: f"{value:.1f}" for key, value in box.items()}, "class": name})
    _titled(found, title)


def dot(parent: ET.Element, at: Point, name: str, title: str = "", radius: float = 3) -> None:
    """A round mark with a title."""
    where = {"cx": f"{at[0]:.1f}", "cy": f"{at[1]:.1f}", "r": f"{radius:g}"}
    _titled(ET.SubElement(parent, "circle", {**where, "class": f"dot {name}"}), title)


def _titled(element: ET.Element, title: str) -> None:
    if title:
        ET.SubElement(element, "title").text = title


def steps(points: Sequence[Point], until: float) -> list[Point]:
    """The corners of a staircase: each value holds until the next one's place, the last until `until`."""
    corners: list[Point] = []
    for (x, y), (following, _) in zip(points, [*points[1:], (until, 0.0)], strict=True):
        corners += [(x, y), (max(x, following), y)]
    return corners


def grid(parent: ET.Element, across: Axis, up: Axis, ticks: Sequence[float], spell: Callable[[float], str]) -> None:
    """Horizontal lines with their values at the left."""
    for value in ticks:
        y = up.at(value)
        line(parent, (across.start, y), (across.end, y), "grid")
        text(parent, (across.start - 6, y + 4), spell(value), "tick", "end")


def markup(drawing: ET.Element) -> str:
    """The text of a drawing, escaped as XML is."""
    return ET.tostring(drawing, encoding="unicode")
