"""The bars of ovit train: one for the epoch, and one more while a pruning step goes on."""

from typing import Any

import pytest
from rich.console import Console

from ovit_engine.cli.train import Bars


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_shows_how_far_a_pruning_step_is(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Console, "is_terminal", property(lambda console: is_terminal))
    bars: Any = Bars()
    progress = bars.progress()
    if not is_terminal:
        progress.work("ovit_prune: gradients", 0, 32)
        progress.work("ovit_prune: gradients", 16, 32)  # seconds have not passed since
        assert capsys.readouterr().out == "ovit_prune: gradients 0 of 32\n"
        return
    rows = bars._bar.tasks
    assert [row.visible for row in rows] == [True, False]
    progress.work("ovit_prune: gradients", 16, 32)
    assert (rows[1].description, rows[1].completed, rows[1].total) == ("ovit_prune: gradients", 16, 32)
    assert rows[1].visible
    progress.work("ovit_prune: eliminate", 10, 100)
    assert (rows[1].description, rows[1].completed, rows[1].total) == ("ovit_prune: eliminate", 10, 100)
    progress.work("ovit_prune: eliminate", 100, 100)
    assert not rows[1].visible
