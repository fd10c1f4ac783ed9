"""The page's figures as SVG, drawn by matplotlib: colors follow the page, and a pointer on a mark shows its value."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from markupsafe import Markup

from ovit_engine.report.timeline import Lane, Panel, Timeline
from ovit_engine.report.tradeoff import Scatter
from ovit_engine.utils.plots import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 72  # matplotlib counts SVG in points: so that one is a pixel of the page
_LEFT, _RIGHT = 54.0, 14.0
_LANE, _GAP, _FOOT = 30.0, 38.0, 34.0
_MOST_DOTS = 80
_LETTER = 6.2  # pixels of a letter at most, on average

# what is drawn in these colors takes the page's, by the names of its style sheet
_INK, _SOFT, _LINE = "#010101", "#020202", "#030303"
_SERIES = tuple(f"#04040{index}" for index in range(6))
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _LINE: "--line"} | {c: f"--s{i}" for i, c in enumerate(_SERIES)}

_PAGE_STYLE: dict[str, Any] = {
    **STYLE,
    "svg.fonttype": "none",
    "font.size": 11.5,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.titlecolor": _INK,
    "axes.spines.left": False,
    "axes.spines.bottom": False,
    "axes.grid.axis": "y",
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": _LINE,
    "text.color": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "legend.labelcolor": _SOFT,
}


class _Sheet:
    """A matplotlib figure measured in the page's pixels."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        self._tips: list[str] = []

    def axes(self, top: float, height: float, *, left: float = _LEFT) -> Axes:
        """Return axes that are `height` pixels high and begin `top` pixels from above."""
        across = (self.width - left - _RIGHT) / self.width
        return self.figure.add_axes((left / self.width, 1 - (top + height) / self.height, across, height / self.height))

    def dot(self, axes: Axes, x: float, y: float, words: str, color: str, size: float = 5.0) -> None:
        """Draw a mark that shows `words` under the pointer."""
        axes.plot(x, y, "o", color=color, markersize=size, clip_on=False, gid=f"tip-{len(self._tips)}")
        self._tips.append(words)

    def svg(self, label: str) -> Markup:
        """Return the drawing for an HTML page; `label` is what a screen reader says."""
        text = io.StringIO()
        self.figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        root = ET.fromstring(text.getvalue())
        for parent in list(root.iter()):
            for child in [child for child in parent if child.tag.endswith(("}style", "}metadata", "}clipPath"))]:
                parent.remove(child)
        for element in root.iter():
            self._adopt(element)
        size = {"width": f"{self.width:g}", "height": f"{self.height:g}"}
        root.attrib.update({"role": "img", "aria-label": label, **size})
        return Markup(ET.tostring(root, encoding="unicode"))  # ElementTree has escaped it

    def _adopt(self, element: ET.Element) -> None:
        """Make an element one of the page: no namespaces, no names of groups, the page's colors, titles."""
        element.tag = element.tag.rpartition("}")[2]
        name = element.get("id", "")
        if name.startswith("tip-"):
            title = ET.Element("title")
            title.text = self._tips[int(name.removeprefix("tip-"))]
            element.insert(0, title)
        element.attrib.pop("clip-path", None)  # nothing lies outside of its axes
        if element.tag == "g":
            element.attrib.pop("id", None)
        for key, value in list(element.attrib.items()):
            if key.startswith("{"):
                element.set(key.rpartition("}")[2], element.attrib.pop(key))
            if key == "style":
                for color, variable in _VARIABLES.items():
                    value = value.replace(color, f"var({variable})")
                element.set(key, value)


@contextmanager
def _page_style(name: str) -> Iterator[None]:
    from matplotlib import style

    with style.context(["default", {**_PAGE_STYLE, "svg.hashsalt": name}]):  # names differ from figure to figure
        yield


def draw_timeline(timeline: Timeline, width: float) -> Markup:
    """Draw all panels below each other on one time axis, `width` pixels wide."""
    lanes, panels, last = timeline.lanes, timeline.panels, timeline.last
    top = len(lanes) * _LANE
    height = top + sum(panel.height + _GAP for panel in panels) + _FOOT
    with _page_style(f"timeline {width}"):
        sheet = _Sheet(width, height)
        if lanes:
            _draw_lanes(sheet, lanes, last)
        axes = None
        for panel in panels:
            top += _GAP
            axes = sheet.axes(top, panel.height)
            _draw_panel(sheet, axes, panel, last)
            for epoch in timeline.marks:
                axes.axvline(epoch, color=_SOFT, linewidth=1, linestyle=(0, (2, 3)), alpha=0.7)
            axes.tick_params(labelbottom=panel is panels[-1])
            top += panel.height
        assert axes is not None
        axes.set_xlabel("epochs", loc="right", color=_SOFT)
        return sheet.svg(f"timeline of {last:g} epochs: {', '.join(panel.title for panel in panels)}")


def _draw_lanes(sheet: _Sheet, lanes: tuple[Lane, ...], last: float) -> None:
    axes = sheet.axes(0, len(lanes) * _LANE)
    axes.set(xlim=(0, last), ylim=(len(lanes), 0))
    axes.set_axis_off()
    for row, lane in enumerate(lanes):
        late = lane.start > last / 2
        end = max(lane.end, lane.start + 0.003 * last)
        axes.text(end if late else lane.start, row + 0.45, lane.name, ha="right" if late else "left", color=_INK)
        axes.barh(row + 0.7, end - lane.start, 0.25, lane.start, color=_SERIES[0], alpha=0.3)
        for epoch, words in lane.events if len(lane.events) <= _MOST_DOTS else ():
            sheet.dot(axes, epoch, row + 0.7, f"epoch {epoch:g}: {words}", _SERIES[0])


def _draw_panel(sheet: _Sheet, axes: Axes, panel: Panel, last: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_title(panel.title)
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(6 if sheet.width < 500 else 12, steps=[1, 2, 5, 10]))
    axes.margins(y=0.08)
    for index, (name, points) in enumerate(panel.series):
        xs, ys = zip(*([*points, (last, points[-1][1])] if panel.stairs else points), strict=True)
        axes.plot(xs, ys, color=_SERIES[index % 6], drawstyle="steps-post" if panel.stairs else None, label=name)
        for x, y in points if len(points) <= _MOST_DOTS else ():
            sheet.dot(axes, x, y, f"epoch {x:g}: {name} {panel.spell(y)}", _SERIES[index % 6])
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: panel.spell(value)))
    if panel.span is not None:
        axes.set_ylim(panel.span)
    if len(panel.series) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(panel.series), borderpad=0)


def draw_scatter(chart: Scatter, width: float) -> Markup:
    """Draw a chart, `width` pixels wide; sizes and times start at 0, so that distances are ratios."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    spots = [spot for each in chart.series for spot in each.spots]
    legend = 18.0 * len(chart.series)
    with _page_style(f"{chart.title} {width}"):
        sheet = _Sheet(width, 300 + legend)
        axes = sheet.axes(40 + legend, 212, left=58)
        axes.set_title(chart.title, pad=legend + 16, x=-(58 - 2) / (width - 58 - _RIGHT))
        for index, each in enumerate(chart.series):
            color = _SERIES[index % 6]
            places = sorted((spot.x, spot.y) for spot in each.spots)
            if each.joined:
                axes.plot(*zip(*places, strict=True), color=color, linewidth=1, alpha=0.5)
            axes.plot([], [], "o", color=color, label=each.name)
            for spot in each.spots:  # the first series larger: what lies on it leaves a ring
                words = f"{spot.name}: {chart.spell_y(spot.y)}, {chart.spell_x(spot.x)}"
                sheet.dot(axes, spot.x, spot.y, words, color, 8 if index else 12)
        if chart.level is not None:
            axes.axhline(chart.level[1], color=_SOFT, linewidth=1.3, linestyle=(0, (6, 4)))
        axes.margins(y=0.15)
        axes.set_xlim(0, 1.12 * max(spot.x for spot in spots))
        axes.xaxis.set_major_locator(MaxNLocator(4 if width < 400 else 6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: chart.spell_x(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: chart.spell_y(value)))
        axes.set_xlabel(chart.axis, loc="right", color=_SOFT)
        axes.legend(loc="lower left", bbox_to_anchor=(-58 / (width - 58 - _RIGHT), 1.02), borderpad=0, handlelength=1)
        _write_names(axes, chart, width)
        return sheet.svg(f"{chart.title}: {len(spots)} models")


def _write_names(axes: Axes, chart: Scatter, width: float) -> None:
    """Write a name above or below each spot where nothing else is; the rest have theirs under the pointer."""
    axes.autoscale_view()
    spots = [(*axes.transData.transform((spot.x, spot.y)), spot.name) for each in chart.series for spot in each.spots]
    names = [(x, (y + 9, y - 18), name) for x, y, name in reversed(spots)]
    if chart.level is not None:
        y = axes.transData.transform((0, chart.level[1]))[1]
        names.insert(0, (width, (y + 4, y - 13), f"{chart.level[0]} {chart.spell_y(chart.level[1])}"))
    taken = [(x - 6, x + 6, y - 6, y + 6) for x, y, _ in spots]
    written: set[tuple[float, float, str]] = set()
    for x, bases, name in names:
        half = _LETTER * len(name) / 2
        middle = min(max(x, 58 + half), width - _RIGHT - half)
        for base in bases:
            box = (middle - half, middle + half, base - 2, base + 11)
            key = (round(x), round(bases[0]), name)  # a checkpoint and its file
            if key not in written and not any(_overlap(box, other) for other in taken) and base > _FOOT:
                axes.annotate(name, (middle, base), xycoords="figure pixels", ha="center", annotation_clip=False)
                taken.append(box)
                written.add(key)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Return whether two boxes (left, right, bottom, top) overlap."""
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
