"""Line plots as SVG and PNG, without pyplot and its global state."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovit_engine.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Lines = Mapping[str, Sequence[tuple[float, float]]]

# Okabe and Ito's colors, which people with any color vision can distinguish, without the yellow (too light on white)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

MARKERS = "osD^vPX"

INK, GRID = "#333333", "#E3E3E3"

MOST_TICKS = 8  # a logarithmic axis marks each value if there are no more than this

STYLE: dict[str, Any] = {
    "svg.hashsalt": "ovit",  # names inside the SVG: the same data give the same bytes
    "font.size": 10,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


def plot_lines(
    path: Path,
    series: Lines,
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    percent_x: bool = False,
    percent_y: bool = False,
    level: tuple[str, float] | None = None,
) -> list[Path]:
    """Draw one line per series and write `<path>.svg` and `<path>.png`, each whole or not at all.

    Equal arguments give equal bytes with one version of matplotlib; the user's own matplotlib settings neither count
    nor change.

    Args:
        path: of both files, without suffix.
        series: points (x, y) by the name that the legend shows; drawn in the order of x.
        title: above the plot; `x` and `y` name the axes.
        log_x, log_y: logarithmic axes, for positive values only.
        percent_x, percent_y: the values are shares, shown as 75 %.
        level: the name and height of a dashed line across the plot, such as the dense accuracy.

    Raises:
        ValueError: nothing to draw, a value that is no number, or one that a logarithmic axis can't show.
        OSError: the folder is missing or can't be written.
    """
    _check(series, level, log_x, log_y)
    from matplotlib import style

    written = []
    with style.context(["default", STYLE]):
        figure = _figure(series, level)
        axes = figure.axes[0]
        axes.set(title=title, xlabel=x, ylabel=y)
        values = sorted({point[0] for line in series.values() for point in line})
        _scale(axes.xaxis, log_x, percent_x, values if len(values) <= MOST_TICKS else ())
        _scale(axes.yaxis, log_y, percent_y, ())
        if len(series) + (level is not None) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            file = path.with_name(f"{path.name}.{suffix}")  # with_suffix would cut "accuracy_0.75"
            options: dict[str, Any] = {"format": suffix, "dpi": 160, "metadata": metadata, "bbox_inches": "tight"}
            atomic_write(file, lambda stream, options=options: figure.savefig(stream, **options))  # type: ignore[misc]
            written.append(file)
    return written


def _check(series: Lines, level: tuple[str, float] | None, log_x: bool, log_y: bool) -> None:
    if not any(series.values()):
        raise ValueError("there is nothing to plot: every series is empty")
    points = [(name, *point) for name, line in series.items() for point in line]
    points += [] if level is None else [(level[0], points[0][1], level[1])]
    for name, across, up in points:
        if not (math.isfinite(across) and math.isfinite(up)):
            raise ValueError(f"can't plot the point ({across}, {up}) of {name!r}")
        if (log_x and across <= 0) or (log_y and up <= 0):
            raise ValueError(f"a logarithmic axis can't show the point ({across}, {up}) of {name!r}")


def _figure(series: Lines, level: tuple[str, float] | None) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0))
    axes: Axes = figure.add_subplot()
    if level is not None:
        axes.axhline(level[1], color="#777777", linestyle=(0, (5, 3)), linewidth=1.3, label=level[0])
    for index, (name, line) in enumerate(series.items()):
        turn, place = divmod(index, len(COLORS))
        across, up = zip(*sorted(line), strict=True) if line else ((), ())
        axes.plot(
            across,
            up,
            label=name,
            color=COLORS[place],
            marker=MARKERS[place],
            linestyle=("-", (0, (4, 1.5)))[turn % 2],  # repeated colors are dashed
            markersize=5,
            linewidth=1.8,
            zorder=3 - index / len(series),  # the first series lies on top
        )
    return figure


def _scale(axis: Any, logarithmic: bool, percent: bool, ticks: Sequence[float]) -> None:
    """Set readable ticks: 75 %, 16 or 2,048 rather than 2 x 10^3; `ticks` are those of a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if not logarithmic:
        if percent:
            axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    if ticks:
        axis.set_ticks(ticks)
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"))
