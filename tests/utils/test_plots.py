"""Plots: the same bytes each time, no trace in matplotlib's settings, and errors that name the point."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from ovit_engine.utils.plots import COLORS, plot_lines

SERIES = {"ovit": [(0.5, 0.98), (0.9, 0.83)], "magnitude": [(0.9, 0.32), (0.5, 0.97)]}
LABELS = {"title": "One-shot", "x": "sparsity", "y": "accuracy"}


def test_an_svg_and_a_png_that_open(tmp_path: Path) -> None:
    files = plot_lines(tmp_path / "at_0.75", SERIES, **LABELS, percent_x=True, percent_y=True, level=("dense", 0.99))
    assert [file.name for file in files] == ["at_0.75.svg", "at_0.75.png"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert ET.parse(files[0]).getroot().tag.endswith("svg")
    with Image.open(files[1]) as image:
        image.load()
        assert image.width > 800
    svg = files[0].read_text()
    for text in ("ovit", "magnitude", "dense", "One-shot", "sparsity", "accuracy", "50 %", "90 %"):
        assert f"<!-- {text} -->" in svg  # matplotlib draws letters as paths, and says what they are
    for color in (*COLORS[:2], "#777777"):
        assert color.lower() in svg


def test_the_same_data_give_the_same_bytes_whatever_the_user_set(tmp_path: Path) -> None:
    first = [file.read_bytes() for file in plot_lines(tmp_path / "a", SERIES, **LABELS)]
    with matplotlib.rc_context(
        {"font.size": 30, "svg.hashsalt": "mine", "axes.grid": False, "figure.facecolor": "black"}
    ):
        second = [file.read_bytes() for file in plot_lines(tmp_path / "b", SERIES, **LABELS)]
        assert matplotlib.rcParams["font.size"] == 30  # put back
    assert first == second
    assert matplotlib.rcParams["svg.hashsalt"] != "ovit"


def test_points_are_joined_in_the_order_of_x(tmp_path: Path) -> None:
    turned = {name: line[::-1] for name, line in SERIES.items()}
    first, second = (plot_lines(tmp_path / n, s, **LABELS)[0].read_bytes() for n, s in (("a", SERIES), ("b", turned)))
    assert first == second


def test_logarithmic_axes_show_the_sizes_that_were_measured(tmp_path: Path) -> None:
    series = {"oViT": [(16, 0.2), (64, 0.7), (2048, 24)]}
    svg = plot_lines(tmp_path / "a", series, **LABELS, log_x=True, log_y=True, level=("limit", 2))[0].read_text()
    for text in ("16", "64", "2,048", "0.2", "0.5", "20"):
        assert f"<!-- {text} -->" in svg
    many = {"oViT": [(2**power, 2.0**power) for power in range(12)]}
    svg = plot_lines(tmp_path / "b", many, **LABELS, log_x=True)[0].read_text()
    assert "<!-- 1,000 -->" in svg
    assert "<!-- 1,024 -->" not in svg


def test_no_pyplot_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ovit_engine.utils.plots import plot_lines; "
        f"plot_lines(Path({str(tmp_path / 'a')!r}), {{'a': [(1, 2)]}}, title='t', x='x', y='y'); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("series", "options", "message"),
    [
        ({}, {}, "there is nothing to plot"),
        ({"a": []}, {}, "there is nothing to plot"),
        ({"a": [(1, float("nan"))]}, {}, r"can't plot the point \(1, nan\) of 'a'"),
        ({"a": [(0, 1)]}, {"log_x": True}, r"a logarithmic axis can't show the point \(0, 1\) of 'a'"),
        ({"a": [(1, 1)]}, {"log_y": True, "level": ("zero", 0)}, r"a logarithmic axis .* \(1, 0\) of 'zero'"),
    ],
)
def test_what_can_not_be_drawn_is_an_error_and_leaves_no_file(
    tmp_path: Path, series: dict[str, list[tuple[float, float]]], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plot_lines(tmp_path / "a", series, **LABELS, **options)
    assert not list(tmp_path.iterdir())
