"""Trains once unbroken and once killed again and again, and compares every checkpoint of the two."""

import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

from ovit_engine.core.capabilities import timeline_rows
from ovit_engine.core.recipe import Recipe
from ovit_engine.core.schedule import Clock
from ovit_engine.sweep.folder import FOLDER
from ovit_engine.training.verify_resume.resumable_loop import ERROR, JOURNAL, Job, checkpoints, newest, train_in_child
from ovit_engine.training.verify_resume.scheduled_kills import ScheduledKill, schedule_kills
from ovit_engine.training.verify_resume.state_differences import Difference, state_differences
from ovit_engine.utils.torch_files import load_file

_GUARD = "its error stands above; a script that calls verify_resume needs `if __name__ == '__main__':` around it"


@dataclass(frozen=True)
class Restart:
    """A kill and what came after it."""

    kill: ScheduledKill
    where: str  # in words
    resumed: int  # step of the checkpoint that training resumed from, 0 = from the start


@dataclass(frozen=True)
class Verdict:
    """What came out."""

    restarts: tuple[Restart, ...]
    compared: tuple[str, ...]  # files of both trainings
    differs: str | None = None  # the first file in which they differ
    differences: tuple[Difference, ...] = field(default=())  # in that file

    @property
    def identical(self) -> bool:
        """Whether every checkpoint is the same, bit for bit."""
        return self.differs is None


def verify_resume(job: Job, folder: Path, *, kills: int, seed: int = 0) -> Verdict:
    """Kill a training `kills` times by SIGKILL, resume each time, and compare with one that was not killed.

    Args:
        job: what is trained.
        folder: an empty folder; it gets the checkpoints of both trainings, in `unbroken` and `killed`.
        seed: of the places of the kills.

    Returns:
        Of weights, quantizer ranges, optimizer, masks, and all else that the engine keeps, where the first difference
        is, if there is one.

    Raises:
        ValueError: the training can't be done at all.
        RuntimeError: a child ended in another way than it was told to.
    """
    unbroken, killed = folder / "unbroken", folder / "killed"
    for each in (unbroken, killed):
        each.mkdir(parents=True)
    start_training(job, unbroken, None)
    restarts = []
    for kill in schedule_kills(kills, total=job.total_steps, every=job.every, events=event_steps(job), seed=seed):
        start_training(job, killed, kill)
        where, start = (killed / JOURNAL).read_text().splitlines()[-1], newest(killed)
        restarts.append(Restart(kill, where, 0 if start is None else int(start.stem.removeprefix("step-"))))
    start_training(job, killed, None)
    return _compare(unbroken, killed, tuple(restarts))


def event_steps(job: Job) -> list[int]:
    """Steps after which the recipe does something, 0 for attach; the first of a phase of learning rates among them."""
    clock = Clock(job.steps_per_epoch, job.total_steps)
    modifiers = Recipe.parse(job.recipe).modifiers
    return sorted({step for step, _, _ in timeline_rows(modifiers, clock) if step <= job.total_steps})


def start_training(job: Job, folder: Path, kill: ScheduledKill | None) -> None:
    """Train in a process of its own from the newest checkpoint in `folder`, to the end or to where `kill` says.

    Raises:
        ValueError: the training can't be done.
        RuntimeError: the process ended in another way.
    """
    context = multiprocessing.get_context("forkserver")
    # what takes seconds to import is imported once; no training ever runs in the process that is forked
    built_by = getattr(job.build, "func", job.build).__module__
    context.set_forkserver_preload([__name__, "ovit_engine.modifiers", built_by])
    # before Python 3.13 the server imports by a path of its own: perhaps another copy of us than this one
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path)):
        forkserver.ensure_running()
    process = context.Process(target=train_in_child, args=(job, folder, kill))
    process.start()
    process.join()
    code = process.exitcode
    process.close()
    if (folder / ERROR).exists():
        raise ValueError((folder / ERROR).read_text())
    expected = 0 if kill is None else -signal.SIGKILL
    if code != expected:
        why = "out of memory?" if code == -signal.SIGKILL else _GUARD
        raise RuntimeError(f"the training ended with exit code {code}, not {expected} ({why})")


def _compare(unbroken: Path, killed: Path, restarts: tuple[Restart, ...]) -> Verdict:
    names, others = (
        [*checkpoints(folder), *sorted(f"{FOLDER}/{path.name}" for path in (folder / FOLDER).glob("*.pt"))]
        for folder in (unbroken, killed)
    )
    compared = tuple(dict.fromkeys([*names, *others]))
    for name in compared:
        if name not in names or name not in others:
            there = "unbroken" if name in names else "killed"
            return Verdict(restarts, compared, name, (Difference(name, f"only the {there} training left it"),))
        found = tuple(state_differences(load_file(unbroken / name), load_file(killed / name)))
        if found:
            return Verdict(restarts, compared, name, found)
    return Verdict(restarts, compared)
