"""The whole way to the file, tried on a copy of the model before training starts.

What can't be exported, or would not be what the recipe promises, shows after minutes of training or days. So a copy
goes through training in a time lapse: only the steps at which modifiers begin and end are made, on two of the example
inputs; pruners take the smallest weights, since which weights go plays no part here.
"""

import copy
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ovit_engine.core.capabilities import Scheduled, having
from ovit_engine.distributed.comm import single_process
from ovit_engine.distributed.sharding import sharded_modules
from ovit_engine.export.deploy import try_write
from ovit_engine.export.writer import as_inputs
from ovit_engine.gradients.calibration import Calibration
from ovit_engine.masking.parameters import unwrapped
from ovit_engine.utils.autograd import eval_mode
from ovit_engine.utils.copying import copy_model
from ovit_engine.utils.random_states import random_state, set_random_state

if TYPE_CHECKING:
    from ovit_engine.engine import Engine

MAX_EXAMPLES = 8

_IN_TRAINING = 2  # examples of a step: one is too few for batch-norm

log = logging.getLogger(__name__)


def rehearse(engine: "Engine", optimizers: Sequence[Optimizer], example_inputs: Tensor | tuple[Tensor, ...]) -> None:
    """Train a copy of a prepared engine in a time lapse and try to export it.

    Nothing is written, and random states are restored. A model that can't be copied is not rehearsed, with a warning.

    Raises:
        ExportError: the model can't be exported, or the file would break its promise.
        ValueError: the model does not take `example_inputs`.
    """
    begin, state = time.perf_counter(), random_state()
    wide = [each[:MAX_EXAMPLES] for each in as_inputs(example_inputs)]
    inputs = tuple(each.float() if each.is_floating_point() else each for each in wide)
    copied = _copied(engine, optimizers)
    if copied is None:
        return
    twin, twins = copied
    try:
        with single_process(), _quiet():
            model = unwrapped(twin.model).float().cpu()
            _check_forward(model, inputs)
            steps = _steps(twin)
            for number, _ in enumerate(_train(twin, model, twins, inputs, steps)):
                engine.run.progress("rehearsal: training steps", number + 1, len(steps))
            try_write(model, inputs, modifiers=twin.modifiers, masks=twin.run.masks)
    finally:
        set_random_state(state)
    log.info("rehearsed %d steps and the export in %.1f s", len(steps), time.perf_counter() - begin)


def _copied(engine: "Engine", optimizers: Sequence[Optimizer]) -> tuple["Engine", Sequence[Optimizer]] | None:
    """Return a copy without sweep and loggers, and optimizers of its parameters; None, with a warning, if it fails."""
    if sharded_modules(engine.model):
        log.warning("not rehearsed: the model is sharded")
        return None
    run = engine.run
    memo: dict[int, Any] = {id(run.logs): [], id(run.progress): run.progress, id(engine.sweep): None}
    try:
        copy_model(engine.model, memo)
        return copy.deepcopy((engine, optimizers), memo)
    except Exception as error:  # whatever the model's own code raises
        log.warning("not rehearsed: the model can't be copied: %s", error)
        return None


def _check_forward(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raise ValueError where the model does not take the inputs at all."""
    try:
        with eval_mode(model):
            model(*inputs)
    except Exception as error:  # whatever the model's own code raises
        shapes = ", ".join(str(list(each.shape)) for each in inputs)
        raise ValueError(f"the model does not take example_inputs of shape {shapes}: {error}") from error


def _steps(engine: "Engine") -> list[int]:
    """The steps at which modifiers begin and end, and the last one."""
    clock = engine.run.clock
    steps = {1, clock.total_steps}
    for modifier in having(engine.modifiers, Scheduled):
        rows = sorted({step for step, *_ in modifier.timeline(clock)} - {0})
        steps |= {*rows[:1], *rows[-1:]}
    return sorted(steps)


def _train(
    engine: "Engine",
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    inputs: tuple[Tensor, ...],
    steps: Sequence[int],
) -> Iterator[int]:
    """Make these steps of all, and detach."""
    few = tuple(torch.cat([each] * _IN_TRAINING)[:_IN_TRAINING] for each in inputs)
    items: Any = [(each if len(inputs) > 1 else each[0], 0) for each in zip(*inputs, strict=True)]
    engine.run.is_rehearsal = True
    engine.attach(*optimizers, calibration=Calibration(items, lambda outputs, target: _loss(outputs)))
    for step in steps:
        engine.run.step = step - 1
        model.train()
        model.zero_grad()
        engine.loss(_loss(model(*few))).backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.state.clear()  # of the device of the model that trains
            optimizer.step()
        yield step
    engine.detach()


def _loss(outputs: object) -> Tensor:
    """A loss that every output has a part in."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([leaf.float().square().mean() for leaf in leaves]).sum()


@contextmanager
def _quiet() -> Iterator[None]:
    """What modifiers say is said again in training itself."""
    root = logging.getLogger("ovit_engine")
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
