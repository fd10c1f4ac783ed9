"""The training that is killed: a plain loop as a user writes it, which can go on in the middle of an epoch."""

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from ovit_engine.core.recipe import Recipe
from ovit_engine.engine import Engine
from ovit_engine.gradients.calibration import Calibration
from ovit_engine.sweep.folder import FOLDER
from ovit_engine.training.verify_resume.kills import Executioner, Kill
from ovit_engine.utils.torch_files import first_line, load_file

ERROR, JOURNAL = "error.txt", "journal.txt"


@dataclass(frozen=True)
class Setup:
    """What a script makes anew each time it starts."""

    model: nn.Module
    dataset: Dataset[Any]  # of (inputs, target), the same at every start
    loss_fn: Callable[[Any, Any], Tensor]
    optimizer: Callable[[nn.Module], Optimizer]


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


class ResumableSampler(Sampler[int]):
    """An order of the images that depends on seed and epoch alone, from which training can go on anywhere."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch, self.position = length, seed, 0, 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator)[self.position :].tolist())

    def __len__(self) -> int:
        return self.length - self.position

    def state_dict(self) -> dict[str, int]:
        """Epoch, and images of it that were trained on."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]


def train(job: Job, folder: Path, kill: Kill | None = None) -> None:
    """Train from the newest checkpoint in `folder`, or from the start, to the end or to where `kill` says."""
    executioner = Executioner(kill, folder / JOURNAL)
    torch.manual_seed(job.seed)
    setup = job.build()
    model = setup.model
    engine = Engine(
        model, Recipe.parse(job.recipe), steps_per_epoch=job.steps_per_epoch, epochs=job.epochs, output=folder
    ).prepare()
    optimizer = setup.optimizer(model)
    sampler = ResumableSampler(job.steps_per_epoch * job.batch_size, job.seed)
    parts: dict[str, Any] = {"engine": engine, "model": model, "optimizer": optimizer, "sampler": sampler}
    start = newest(folder)
    if start is None:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)  # of a sweep, killed before its first checkpoint
    else:
        state = load_file(start)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])  # of dropout and the like

    def save() -> None:
        state = {name: part.state_dict() for name, part in parts.items()}
        state["random"] = torch.get_rng_state()
        executioner.save(folder / checkpoint_name(engine.run.step), state, engine.run.step)

    calibration = Calibration(setup.dataset, setup.loss_fn, seed=job.seed)
    loader: DataLoader[Any] = DataLoader(
        setup.dataset,
        batch_size=job.batch_size,
        sampler=sampler,
        generator=torch.Generator(),  # or each new iterator would draw from torch's global state
    )

    def measure(trained: nn.Module) -> float:
        trained.eval()
        return -float(sum(setup.loss_fn(trained(x), y) for x, y in DataLoader(setup.dataset, job.batch_size)))

    # hooks run in the order in which they were made: one before and one after the engine's
    optimizer.register_step_post_hook(lambda *_: executioner.begin_events(engine.run.step + 1))
    executioner.begin_events(engine.run.step)
    engine.attach(optimizer, calibration=calibration, evaluate=measure)
    executioner.end_events(engine.run.step)
    optimizer.register_step_post_hook(lambda *_: executioner.end_events(engine.run.step))
    model.train()
    while sampler.epoch < job.epochs:
        for x, y in loader:
            step = engine.run.step + 1
            executioner.pass_by("start", step)
            optimizer.zero_grad()
            engine.loss(setup.loss_fn(model(x), y)).backward()  # type: ignore[no-untyped-call]
            executioner.pass_by("gradients", step)
            optimizer.step()
            sampler.position += len(y)
            if step % job.every == 0 and step < job.total_steps:
                save()
        sampler.epoch, sampler.position = sampler.epoch + 1, 0
    engine.detach()
    save()


def checkpoint_name(step: int) -> str:
    """The file's name; names sort as steps do."""
    return f"step-{step:08d}.pt"


def checkpoints(folder: Path) -> dict[str, Path]:
    """Every checkpoint in a folder by its name, in the order of time."""
    return {path.name: path for path in sorted(folder.glob("step-*.pt"))}


def newest(folder: Path) -> Path | None:
    """The last checkpoint that was written, if any."""
    return next(reversed(checkpoints(folder).values()), None)


def train_in_child(job: Job, folder: Path, kill: Kill | None) -> None:
    """`train` as the body of a process; an error is left in a file for the parent."""
    torch.set_num_threads(1)  # small models; and sums are of the same order at every start
    warnings.simplefilter("ignore")
    logging.getLogger("ovit_engine").setLevel(logging.ERROR)
    try:
        train(job, folder, kill)
    except Exception as error:
        text = first_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {first_line(error)}"
        (folder / ERROR).write_text(text)
        os._exit(1)
