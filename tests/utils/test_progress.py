"""Bars on a terminal, lines now and then elsewhere."""

import io
import logging

import pytest
from rich.console import Console

from ovit_engine.utils import progress
from ovit_engine.utils.progress import ProgressReport


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_no_more_often_than_asked(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    report = ProgressReport()
    with caplog.at_level(logging.INFO, logger="ovit_engine.utils.progress"):
        for done in range(0, 1025, 16):
            report("ovit_prune: gradients", done, 1024)
            clock[0] += 2.5
        report("ovit_prune: eliminate", 1, 2)
        clock[0] += 1
        report("ovit_prune: gradients", 0, 1024)
    assert caplog.messages[:3] == [
        "ovit_prune: gradients 0 of 1024",
        "ovit_prune: gradients 64 of 1024, about 0:02:30 left",
        "ovit_prune: gradients 128 of 1024, about 0:02:20 left",
    ]
    assert caplog.messages[-2:] == ["ovit_prune: gradients 1024 of 1024", "ovit_prune: gradients 0 of 1024"]
    assert len(caplog.messages) == 18


def test_lines_go_to_a_console_that_is_no_terminal(clock: list[float]) -> None:
    stream = io.StringIO()
    with ProgressReport(Console(file=stream), every=5.0) as report:
        for done in range(4):
            report("work", done, 3)
            clock[0] += 4.0
    assert stream.getvalue() == "work 0 of 3\nwork 2 of 3, about 0:00:04 left\n"
    assert not report.has_bars


def test_a_terminal_shows_one_bar_per_work_until_it_is_done(clock: list[float]) -> None:
    stream = io.StringIO()
    with ProgressReport(Console(file=stream, force_terminal=True, width=80)) as report:
        report("epoch 1/2", 3, 8)
        report("gradients", 16, 32)
        bars = report._bars.tasks
        assert [(bar.description, bar.completed, bar.total) for bar in bars] == [
            ("epoch 1/2", 3, 8),
            ("gradients", 16, 32),
        ]
        assert [bar.visible for bar in bars] == [True, True]
        report("gradients", 32, 32)
        assert [bar.visible for bar in bars] == [True, False]
        report("gradients", 4, 32)
        assert (bars[1].completed, bars[1].visible, bars[1].time_remaining) == (4, True, None)
    assert report.has_bars
    assert "epoch 1/2" in stream.getvalue()
