"""The training that is killed: a plain loop as a user writes it, which can resume in the middle of an epoch."""

import logging
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, default_collate

from ovit_engine.core.recipe import Recipe
from ovit_engine.engine import Engine
from ovit_engine.gradients.calibration import Calibration
from ovit_engine.sweep.folder import FOLDER
from ovit_engine.training.verify_resume.scheduled_kills import KillSwitch, ScheduledKill
from ovit_engine.utils.torch_files import first_line, load_file

ERROR, JOURNAL = "error.txt", "journal.txt"


@dataclass(frozen=True)
class Setup:
    """What a script builds each time it starts."""

    model: nn.Module
    dataset: Dataset[Any]  # of (inputs, target), the same at every start
    loss_fn: Callable[[Any, Any], Tensor]
    optimizer: Callable[[nn.Module], Optimizer]

    def batch(self, indices: list[int]) -> tuple[Any, Any]:
        """Return the inputs and targets at these indices."""
        x, y = default_collate([self.dataset[index] for index in indices])
        return x, y


@dataclass(frozen=True)
class Job:
    """A training, as it is handed to another process."""

    build: Callable[[], Setup]  # a function of a module, or a partial of one; called with torch's random state seeded
    recipe: str  # YAML
    steps_per_epoch: int
    epochs: int
    batch_size: int
    every: int  # steps between checkpoints
    seed: int = 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the training."""
        return self.steps_per_epoch * self.epochs

    def indices(self, step: int) -> list[int]:
        """Return the images of a step, counted from 1: a function of seed and step, so that no order is saved."""
        epoch, number = divmod(step - 1, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.steps_per_epoch * self.batch_size, generator=generator)
        return order[number * self.batch_size :][: self.batch_size].tolist()


def train_to_kill(job: Job, folder: Path, kill: ScheduledKill | None) -> None:
    """Train from the newest checkpoint in `folder`, or from the start, to the end or to where `kill` says."""
    switch = KillSwitch(kill, folder / JOURNAL)
    torch.manual_seed(job.seed)
    setup = job.build()
    model, recipe = setup.model, Recipe.parse(job.recipe)
    engine = Engine(model, recipe, steps_per_epoch=job.steps_per_epoch, epochs=job.epochs, output=folder).prepare()
    optimizer = setup.optimizer(model)
    parts: dict[str, Any] = {"engine": engine, "model": model, "optimizer": optimizer}
    start = newest(folder)
    if start is None:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)  # of a sweep, killed before its first checkpoint
    else:
        state = load_file(start)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])  # of dropout and the like

    def save() -> None:
        state = {name: part.state_dict() for name, part in parts.items()} | {"random": torch.get_rng_state()}
        switch.save(folder / checkpoint_name(engine.run.step), state, engine.run.step)

    def measure(trained: nn.Module) -> float:
        x, y = setup.batch(list(range(job.steps_per_epoch * job.batch_size)))
        return -float(setup.loss_fn(trained.eval()(x), y))

    # hooks run in the order in which they were made: one before and one after the engine's
    optimizer.register_step_post_hook(lambda *_: switch.begin_events(engine.run.step + 1))
    switch.begin_events(engine.run.step)
    engine.attach(optimizer, calibration=Calibration(setup.dataset, setup.loss_fn, seed=job.seed), evaluate=measure)
    switch.end_events(engine.run.step)
    optimizer.register_step_post_hook(lambda *_: switch.end_events(engine.run.step))
    model.train()
    for step in range(engine.run.step + 1, job.total_steps + 1):
        x, y = setup.batch(job.indices(step))
        switch.reach("start", step)
        optimizer.zero_grad()
        engine.loss(setup.loss_fn(model(x), y)).backward()  # type: ignore[no-untyped-call]
        switch.reach("gradients", step)
        optimizer.step()
        if step % job.every == 0 and step < job.total_steps:
            save()
    engine.detach()
    save()


def checkpoint_name(step: int) -> str:
    """Return the file's name; names sort as steps do."""
    return f"step-{step:08d}.pt"


def checkpoints(folder: Path) -> dict[str, Path]:
    """Return every checkpoint in a folder by its name, in the order of time."""
    return {path.name: path for path in sorted(folder.glob("step-*.pt"))}


def newest(folder: Path) -> Path | None:
    """Return the last checkpoint that was written, if any."""
    return next(reversed(checkpoints(folder).values()), None)


def train_in_child(job: Job, folder: Path, kill: ScheduledKill | None) -> None:
    """Run `train_to_kill` as the body of a process; an error is left in a file for the parent."""
    torch.set_num_threads(1)  # small models; and sums are of the same order at every start
    warnings.simplefilter("ignore")
    logging.getLogger("ovit_engine").setLevel(logging.ERROR)
    try:
        train_to_kill(job, folder, kill)
    except Exception as error:
        text = first_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {first_line(error)}"
        (folder / ERROR).write_text(text)
        os._exit(1)
