"""Where a training is killed: in every part of a step, at random."""

import io
import os
import random
import signal
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn, get_args

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ovit_engine.utils.files import atomic_write

# of a step, in the order of time
Place = Literal["start", "gradients", "events", "checkpoint"]

_PLACES: tuple[Place, ...] = ("events", "checkpoint", "events", "start", "events", "gradients")

_LARGEST = 3.5  # power of ten: events are killed before one of their first 3,162 operations, or just after them


@dataclass(frozen=True)
class ScheduledKill:
    """One SIGKILL.

    `step` is the optimizer step that it falls into, the first being 1; step 0 is `engine.attach`. Places are before the
    step's forward pass, between its backward pass and its update, among the recipe's events that follow the update (of
    which some operations are done and some are not), and in the middle of writing the checkpoint that is due then.
    """

    step: int
    place: Place
    share: float  # in [0, 1): how far into the events or the file

    @property
    def operation(self) -> int:
        """The number of the torch operation of the events before which to die, counted from 1."""
        return int(10 ** (_LARGEST * self.share))


def schedule_kills(count: int, *, total: int, every: int, events: Collection[int], seed: int) -> list[ScheduledKill]:
    """Return `count` kills in the order of time: half in what the recipe does, the others all over the training.

    Args:
        total: steps of the training.
        every: steps between checkpoints.
        events: steps after which the recipe does something (0: at attach); all come before any comes again.
    """
    generator = random.Random(seed)
    due = generator.sample(sorted(events), len(events))
    kills = []
    for index in range(count):
        place, share = _PLACES[index % len(_PLACES)], generator.random()
        step = generator.randint(1, total)
        if place == "events" and due:
            due.append(step := due.pop(0))
        elif place == "checkpoint" and total >= every:
            step = every * generator.randint(1, total // every)
        elif place != "gradients":
            place = "start"
        kills.append(ScheduledKill(step, place, share))
    return sorted(kills, key=lambda kill: (kill.step, get_args(Place).index(kill.place), kill.share))


class KillSwitch:
    """Kills this process at the scheduled place, and nowhere else; `journal` gets a line that says where it was."""

    def __init__(self, kill: ScheduledKill | None, journal: Path) -> None:
        self._kill, self._journal = kill, journal
        self._countdown: _Countdown | None = None

    def reach(self, place: Place, step: int) -> None:
        """Called before the forward pass of a step ("start"), and after its backward pass ("gradients")."""
        if self._is_due(place, step):
            self._die(f"before step {step}" if place == "start" else f"in step {step}, before its update")

    def begin_events(self, step: int) -> None:
        """Called before the recipe's events of a step; 0 is `attach`."""
        if self._is_due("events", step):
            assert self._kill is not None
            number, what = self._kill.operation, _events(step)
            self._countdown = _Countdown(number, lambda: self._die(f"inside {what}, at operation {number}"))
            self._countdown.__enter__()  # type: ignore[no-untyped-call]

    def end_events(self, step: int) -> None:
        """Called after the events of a step."""
        if self._countdown is not None:
            self._countdown.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._die(f"just after {_events(step)}")

    def save(self, path: Path, state: Mapping[str, Any], step: int) -> None:
        """Write a checkpoint as atomically as `save_file` does; a kill that is due leaves part of it."""
        content = io.BytesIO()
        torch.save(dict(state), content)
        whole = content.getvalue()

        def write(stream: BinaryIO) -> None:
            if self._kill is not None and self._is_due("checkpoint", step):
                part = whole[: int(len(whole) * self._kill.share)]
                stream.write(part)
                stream.flush()
                self._die(f"writing the checkpoint of step {step}, {len(part)} of {len(whole)} bytes")
            stream.write(whole)

        atomic_write(path, write)

    def _is_due(self, place: Place, step: int) -> bool:
        return self._kill is not None and (self._kill.place, self._kill.step) == (place, step)

    def _die(self, where: str) -> NoReturn:
        with self._journal.open("a") as stream:
            stream.write(f"{where}\n")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("SIGKILL was not the end")


def _events(step: int) -> str:
    return "attach" if step == 0 else f"the events of step {step}"


class _Countdown(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `end` before the `number`-th torch operation inside."""

    def __init__(self, number: int, end: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left, self._end = number, end

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left == 0:
            self._end()
        return func(*args, **(kwargs or {}))
