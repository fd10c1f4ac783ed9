"""The estimate of the time left, and when a line is logged."""

import logging

import pytest

from ovit_engine.core import loggers as progress
from ovit_engine.core.loggers import ProgressLog, TimeLeft, spell_seconds


def test_time_left_is_what_is_left_at_the_pace_so_far() -> None:
    left = TimeLeft()
    assert left("a", 10, 100, now=5.0) is None
    assert left("a", 20, 100, now=7.0) == pytest.approx(80 * 0.2)
    assert left("a", 40, 100, now=17.0) == pytest.approx(60 * 12 / 30)
    assert left("a", 100, 100, now=20.0) == 0.0


def test_stages_that_take_turns_do_not_count_each_others_time() -> None:
    left = TimeLeft()
    left("gradients", 10, 40, now=0.0)
    assert left("gradients", 20, 40, now=1.0) == pytest.approx(2.0)
    left("eliminate", 5, 10, now=101.0)
    assert left("gradients", 30, 40, now=103.0) == pytest.approx(1.5)
    assert left("eliminate", 10, 10, now=110.0) == 0.0


def test_what_begins_again_is_estimated_anew() -> None:
    left = TimeLeft()
    left("a", 10, 40, now=0.0)
    left("a", 40, 40, now=300.0)
    assert left("a", 10, 40, now=10_000.0) is None
    assert left("a", 20, 40, now=10_001.0) == pytest.approx(2.0)


def test_a_line_no_more_often_than_asked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    tell = ProgressLog()
    with caplog.at_level(logging.INFO, logger="ovit_engine.core.loggers"):
        for done in range(16, 1025, 16):
            tell("ovit_prune: gradients", done, 1024)
            now += 2.5
        tell("ovit_prune: eliminate", 1, 2)
        now += 1
        tell("ovit_prune: gradients", 0, 1024)
    lines = caplog.messages
    assert lines[0] == "ovit_prune: gradients 80 of 1024, about 148 s left".replace("148 s", "2 min")
    assert lines[6] == "ovit_prune: gradients 464 of 1024, about 88 s left"
    assert len(lines) == 17
    assert lines[-2:] == ["ovit_prune: eliminate 1 of 2", "ovit_prune: gradients 0 of 1024"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (80, "80 s"), (119.4, "119 s"), (720, "12 min"), (12_600, "3.5 h")]
)
def test_seconds_are_spelled_short(seconds: float, text: str) -> None:
    assert spell_seconds(seconds) == text
