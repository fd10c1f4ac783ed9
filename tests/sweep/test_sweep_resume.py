"""A sweep whose training is killed and goes on: no point is lost, and none is of another training."""

import logging
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from ovit_engine.sweep.folder import FOLDER, read_index
from tests.loops import plain
from tests.sweep.sweeping import RISING, SWEEP, Training, kept, same, steps


@pytest.mark.parametrize("metrics", [{}, RISING], ids=["no metric", "metrics"])
@pytest.mark.parametrize(("cut", "killed"), [(0, 5), (10, 13), (12, 13), (13, 18), (18, 22), (20, 20), (25, 33)])
def test_a_resumed_run_keeps_what_the_unbroken_one_keeps(
    tmp_path: Path, cut: int, killed: int, metrics: dict[int, float]
) -> None:
    """The state is of step `cut`, and training went on to `killed`."""
    Training(tmp_path / "unbroken").attach().train(0, 40, metrics).engine.detach()
    training = Training(tmp_path / "broken").attach().train(0, cut, metrics)
    saved = training.save()
    training.train(cut, killed, metrics)
    Training(tmp_path / "broken").load(saved).attach().train(cut, 40, metrics).engine.detach()
    for name in ("0.25", "0.375", "0.5"):
        one, two = kept(tmp_path / "unbroken", name), kept(tmp_path / "broken", name)
        assert same(one["model"], two["model"])
        assert one["point"] == two["point"]
    assert read_index(tmp_path / "broken" / FOLDER) == read_index(tmp_path / "unbroken" / FOLDER)


def test_a_point_that_was_better_than_when_training_was_repeated_stays(tmp_path: Path) -> None:
    training = Training(tmp_path).attach().train(0, 12, {11: 0.5})
    saved = training.save()
    training.train(12, 18, {15: 0.9})
    best = kept(tmp_path, "0.25")["model"]
    Training(tmp_path).load(saved).attach().train(12, 40, {15: 0.6}).engine.detach()
    assert kept(tmp_path, "0.25")["point"]["metric"] == 0.9
    assert same(kept(tmp_path, "0.25")["model"], best)
    assert read_index(tmp_path / FOLDER).points[0].metric == 0.9


def test_the_last_model_of_the_training_that_went_on_counts_where_no_metric_is(tmp_path: Path) -> None:
    training = Training(tmp_path).attach().train(0, 15)
    saved = training.save()
    training.train(15, 22)
    resumed = Training(tmp_path).load(saved)
    resumed.optimizer.param_groups[0]["lr"] = 0.01
    resumed.attach().train(15, 22)
    assert same(kept(tmp_path, "0.25")["model"], resumed.film[20])
    assert not same(resumed.film[20], training.film[20])


def broken_off(state: Any, stream: BinaryIO) -> None:
    stream.write(b"half")
    raise KeyboardInterrupt


def test_a_write_that_is_broken_off_leaves_the_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path).attach().train(0, 12, {11: 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", broken_off)
        with pytest.raises(KeyboardInterrupt):
            training.engine.metric("accuracy", 0.6)
    assert kept(tmp_path, "0.25")["point"]["metric"] == 0.5
    training.engine.metric("accuracy", 0.6)
    assert kept(tmp_path, "0.25")["point"]["metric"] == 0.6


def test_a_run_that_goes_on_in_another_folder_says_what_stays_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = Training(tmp_path / "1").attach().train(0, 15, {14: 0.9}).save()
    with caplog.at_level(logging.WARNING):
        resumed = Training(tmp_path / "2").load(saved).attach()
    assert "the sweep's 0.25.pt is not in" in caplog.text
    resumed.train(15, 40, {16: 0.1}).engine.detach()
    assert steps(tmp_path / "2") == {0.25: 16, 0.375: 30, 0.5: 40}


def test_a_pruning_step_that_was_interrupted_still_makes_its_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path).attach().train(0, 19)
    pruner = type(training.engine.modifiers[0])
    with monkeypatch.context() as patch:
        patch.setattr(pruner, "solve", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            plain(training.model, training.optimizer)
    training.train(20, 40, {20: 0.1}).engine.detach()
    assert steps(tmp_path) == {0.25: 20, 0.375: 30, 0.5: 40}


def test_a_pruning_step_that_comes_late_makes_its_point_at_detach(tmp_path: Path) -> None:
    text = SWEEP.replace("end: 30st", "end: 40st").replace("every: 10st", "every: 15st")
    training = Training(tmp_path, text).attach().train(0, 39)
    with pytest.warns(UserWarning, match="pruning at step 40 is done now"):
        training.engine.detach()
    assert steps(tmp_path) == {0.25: 25, 0.375: 39, 0.5: 39}
    assert int((kept(tmp_path, "0.375")["model"]["0.weight"] == 0).sum()) == 48
    assert int((kept(tmp_path, "0.5")["model"]["0.weight"] == 0).sum()) == 64
