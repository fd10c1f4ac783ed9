"""timm's learning-rate schedules, for recipes that have none of their own."""

import inspect
from collections.abc import Iterable

import torch
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]  # public, though not re-exported by "as"
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from ovit_engine.core.capabilities import LearningRate, having
from ovit_engine.core.modifier import Modifier
from ovit_engine.core.training_options import Training
from ovit_engine.engine import Engine
from ovit_engine.utils.suggest import suggest

OURS = {"optimizer", "sched", "num_epochs", "step_on_epochs", "updates_per_epoch"}  # arguments that the trainer gives


def make_scheduler(engine: Engine, optimizer: Optimizer, training: Training) -> Scheduler | None:
    """The schedule of `training`, in optimizer steps: `step_update(n)` writes the learning rate of step n (from 0).

    Raises:
        RecipeError: what `check_scheduler` finds.
    """
    check_scheduler(training, engine.modifiers)
    return None if training.scheduler is None else _make(training, optimizer, engine.run.steps_per_epoch)


def check_scheduler(training: Training, modifiers: Iterable[Modifier]) -> None:
    """Check the schedule of `training` before there is an optimizer.

    Args:
        modifiers: those of the recipe.

    Raises:
        RecipeError: a modifier writes the learning rate too; arguments that timm's create_scheduler_v2 does not take; a
            schedule of another length.
    """
    if training.scheduler is None:
        return
    for modifier in having(modifiers, LearningRate):
        raise modifier.error(
            f"writes the learning rate, as scheduler {training.scheduler!r} of training does: keep one"
        )
    _check_arguments(training)
    _make(training, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.lr), 1)


def _make(training: Training, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
    assert training.scheduler is not None
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched=training.scheduler,
            num_epochs=training.epochs,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            **training.scheduler_args,
        )
    except (AssertionError, ArithmeticError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise training.error(f"timm refuses them: {reason}", "scheduler_args") from error
    if epochs != training.epochs:
        raise training.error(f"the schedule takes {epochs} epochs, training {training.epochs}", "scheduler_args")
    made: Scheduler = scheduler
    return made


def _check_arguments(training: Training) -> None:
    known = sorted(set(inspect.signature(create_scheduler_v2).parameters) - OURS)
    for name, value in training.scheduler_args.items():
        option = f"scheduler_args.{name}"
        if name not in known:
            raise training.error(f"no such option{suggest(name, known)}", option)
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, (int, float)) for each in values):
            raise training.error(f"must be a number, not {value!r}", option)
