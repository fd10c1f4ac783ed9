"""Accelerate: the engine of a loop whose objects an Accelerator prepares."""

import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard  # type: ignore[import-untyped]
from torch import nn
from torch.optim import Optimizer

from ovit_engine.core.optimizers import layers_of
from ovit_engine.core.recipe import Recipe
from ovit_engine.engine import Engine
from ovit_engine.gradients.calibration import Calibration


def accelerate_engine(
    accelerator: Accelerator,
    model: nn.Module,
    recipe: Recipe | str | Path,
    loader: Any,
    *,
    epochs: int,
    teacher: nn.Module | None = None,
) -> Engine:
    """Return a prepared engine. Call it before the optimizer is made and `accelerator.prepare(model, ...)`.

    Steps are counted as `accelerator.accumulate` makes them, and `accelerator.save_state` saves the engine too: call
    `load_state` after `prepare` and before `attach_accelerate`.

    Args:
        loader: the training loader, prepared already: its length is that of one process's share.
        teacher: as that of an Engine; not prepared.

    Raises:
        TypeError: a loader that is not prepared.
    """
    if not isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):
        raise TypeError(f"give the loader that accelerator.prepare(loader) returns, not a {type(loader).__name__}")
    micro_batches, group = len(loader), accelerator.gradient_accumulation_steps
    if accelerator.gradient_state.sync_with_dataloader:  # an epoch's last step may have fewer micro-batches
        steps = math.ceil(micro_batches / group)
        total = steps * epochs
    else:
        steps, total = max(1, round(micro_batches / group)), micro_batches * epochs // group
    engine = Engine(model, recipe, steps_per_epoch=steps, total_steps=total, teacher=teacher).prepare()
    accelerator.register_for_checkpointing(engine)
    return engine


def attach_accelerate(
    engine: Engine, *optimizers: Optimizer, calibration: Calibration | None = None, **options: Any
) -> Engine:
    """`engine.attach` for optimizers that an Accelerator prepared."""
    inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
    engine.attach(*inner, calibration=calibration, **options)
    if getattr(optimizers[0], "scaler", None) is not None:
        outermost = layers_of(optimizers[0])[-1]  # Accelerate's has no hooks of its own
        engine.keep(outermost.register_step_post_hook(_CountSkipped(engine)))
    return engine


class _CountSkipped:
    """A hook after the step of Accelerate's optimizer, which knows what its scaler skipped."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # where gradients accumulate, what it says is of the step before
        if optimizer.gradient_state.sync_gradients and optimizer.step_was_skipped:
            self._engine.skip_step()
