"""timm's learning-rate schedules, for recipes that have none of their own."""

import difflib
import inspect
from typing import Any

from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]  # public, though not re-exported by "as"
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from ovit_engine.engine import Engine
from ovit_engine.recipe import Training

OURS = {"optimizer", "sched", "num_epochs", "step_on_epochs", "updates_per_epoch"}  # arguments that the trainer gives


def make_scheduler(engine: Engine, optimizer: Optimizer, training: Training) -> Scheduler | None:
    """The schedule of `training`, in optimizer steps: `step_update(n)` writes the learning rate of step n (from 0).

    Raises:
        RecipeError, ValueError: what `check_scheduler` finds, or a schedule of another length.
    """
    check_scheduler(engine, training)
    if training.scheduler is None:
        return None
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=training.scheduler,
        num_epochs=training.epochs,
        step_on_epochs=False,
        updates_per_epoch=engine.run.steps_per_epoch,
        **training.scheduler_args,
    )
    if epochs != training.epochs:
        raise ValueError(f"training.scheduler_args: the schedule takes {epochs} epochs, training {training.epochs}")
    made: Scheduler = scheduler
    return made


def check_scheduler(engine: Engine, training: Training) -> None:
    """Check the schedule of `training` before there is an optimizer; `engine` is prepared.

    Raises:
        RecipeError: a modifier writes the learning rate too.
        ValueError: arguments that timm's create_scheduler_v2 does not take.
    """
    if training.scheduler is None:
        return
    for modifier in engine.modifiers:
        if any(claim.what == "the learning rate" for claim in modifier.claims(engine.run)):
            raise modifier.error(
                f"writes the learning rate, as scheduler {training.scheduler!r} of training does: keep one"
            )
    _check_arguments(training.scheduler_args)


def _check_arguments(arguments: dict[str, Any]) -> None:
    known = sorted(set(inspect.signature(create_scheduler_v2).parameters) - OURS)
    for name, value in arguments.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"training.scheduler_args has no {name!r}; {hint}")
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, (int, float)) for each in values):
            raise ValueError(f"training.scheduler_args.{name}: must be a number, not {value!r}")
