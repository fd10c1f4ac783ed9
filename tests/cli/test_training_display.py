"""What ovit train shows: a bar per epoch and pruning step on a terminal, lines elsewhere."""

import pytest
from rich.console import Console

from ovit_engine.cli.train import TrainingDisplay
from ovit_engine.training.api import EpochMetrics

METRICS = EpochMetrics(epoch=1, loss=0.5, accuracy=0.25, lr=1e-3, sparsity=0.5, seconds=2.0)
LINE = "epoch 1/2  loss 0.5000  accuracy 25.00%  lr 1.00e-03  sparsity 50.00%  2.0 s\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_on_a_terminal_and_lines_elsewhere(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Console, "is_terminal", property(lambda console: is_terminal))
    display = TrainingDisplay()
    listener = display.listener()
    assert listener.work is not None
    listener.begin(1, 2, 8)
    listener.step()
    listener.work("ovit_prune: gradients", 0, 32)
    listener.step()
    bars = {bar.description: (bar.completed, bar.total) for bar in display._report._bars.tasks}
    listener.end(METRICS)
    work = {"ovit_prune: gradients": (0, 32)}
    assert bars == ({"epoch 1/2": (2, 8), **work} if is_terminal else work)
    assert capsys.readouterr().out == ("" if is_terminal else "ovit_prune: gradients 0 of 32\n") + LINE
