"""What reaches loggers. wandb and mlflow are not installed here: objects with their documented signatures stand in."""

import logging
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from ovit_engine import Calibration, Engine
from ovit_engine.core.loggers import Log
from ovit_engine.integrations.tensorboard import tensorboard
from tests.integrations import small


class WandbRun:
    """wandb.Run: `log(data, step=None, commit=None)`."""

    def __init__(self) -> None:
        self.lines: list[tuple[dict[str, float], int | None]] = []

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        assert commit is None
        self.lines.append((dict(data), step))


class Mlflow:
    """The module mlflow: `log_metrics(metrics, step=None, synchronous=None, run_id=None)`."""

    def __init__(self) -> None:
        self.lines: list[tuple[dict[str, float], int | None]] = []

    def log_metrics(
        self, metrics: dict[str, float], step: int | None = None, synchronous: bool | None = None, run_id: Any = None
    ) -> None:
        assert all(isinstance(value, float) for value in metrics.values())
        assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-. /") for name in metrics)  # its rule
        self.lines.append((dict(metrics), step))


def train(*logs: Log, every: int | None = 1, groups: int = 1) -> tuple[Engine, list[float]]:
    model = small.vit()
    engine = Engine(model, small.recipe(), steps_per_epoch=small.STEPS, epochs=small.EPOCHS).prepare()
    first, *others = model.parameters()
    parts = [{"params": [first, *others]}] if groups == 1 else [{"params": [first]}, {"params": others, "lr": 1e-4}]
    optimizer = small.RecordingAdamW(parts, lr=1e-3)
    for log in logs:
        engine.log_to(log, every=every)
    with engine.attach(optimizer, calibration=Calibration(small.TRAIN, cross_entropy)):
        for _ in range(small.EPOCHS):
            for images, classes in DataLoader(small.TRAIN, batch_size=small.BATCH):
                optimizer.zero_grad()
                cross_entropy(model(images), classes).backward()
                optimizer.step()
            engine.metric("accuracy", 0.5)
    return engine, optimizer.rates


def test_every_logger_is_told_the_same_at_steps_that_never_fall() -> None:
    run, mlflow = WandbRun(), Mlflow()
    engine, rates = train(run.log, mlflow.log_metrics)
    assert run.lines == mlflow.lines
    steps = [step for _, step in run.lines]
    assert steps == sorted(steps)
    told: dict[str, list[tuple[int, float]]] = {}
    for values, step in run.lines:
        for name, value in values.items():
            told.setdefault(name, []).append((step, value))
    assert told["lr"] == [(step, rates[step - 1]) for step in range(1, 41)]
    assert [step for step, _ in told["sparsity"]][:2] == [10, 20]
    assert [value for _, value in told["sparsity"]][:2] == pytest.approx([0.3, 0.5], abs=1e-3)
    for name in engine.run.masks.names():
        assert told[f"sparsity/{name}"][-1][1] == engine.run.masks.sparsity(name)
    assert [step for step, _ in told["accuracy"]] == [10, 20, 30, 40]
    assert [step for step, _ in told["ovit_prune/seconds"]] == [10, 20]
    seconds = zip(told["ovit_prune/seconds"], told["ovit_prune/gradients_seconds"], strict=True)
    assert all(0 < part < whole for (_, whole), (_, part) in seconds)
    assert told["quantize/phase"] == [(25, 1.0), (35, 2.0)]


def test_seconds_are_in_no_history() -> None:
    run = WandbRun()
    one, _ = train(run.log)
    two, _ = train()
    assert one.run.history == two.run.history


def test_a_rate_for_each_group_each_few_steps_or_never() -> None:
    seldom, never = WandbRun(), WandbRun()
    train(seldom.log, every=20, groups=2)
    train(never.log, every=None)
    rates = [values for values, _ in seldom.lines if "lr/0" in values]
    assert len(rates) == 2
    assert rates[0]["lr/1"] == pytest.approx(rates[0]["lr/0"] / 10)
    assert not [values for values, _ in never.lines if "lr" in values]
    with pytest.raises(ValueError, match="every must be at least 1 step, not 0"):
        train(never.log, every=0)


@pytest.mark.parametrize("own", [False, True])
def test_tensorboard_holds_what_was_told(tmp_path: Path, own: bool) -> None:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    writer = SummaryWriter(str(tmp_path))
    _, rates = train(tensorboard(writer if own else str(tmp_path)))
    writer.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in found.Scalars("lr")] == [
        (step, pytest.approx(rates[step - 1])) for step in range(1, 41)
    ]
    assert [event.step for event in found.Scalars("ovit_prune/sparsity")] == [10, 20]
