"""Where a training is killed: in every part of a step, at random."""

import io
import os
import random
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ovit_engine.utils.files import atomic_write

Place = Literal["start", "gradients", "events", "checkpoint"]

LARGEST = 3.5  # power of ten: events are killed before one of their first 3,162 operations, or just after them


@dataclass(frozen=True)
class Kill:
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
        return int(10 ** (LARGEST * self.share))


def plan_kills(count: int, *, total: int, every: int, events: Collection[int], seed: int) -> list[Kill]:
    """`count` kills in the order of time: half of them inside what the recipe does, the others all over the training.

    Args:
        total: steps of the training.
        every: steps between checkpoints.
        events: steps after which the recipe does something (0: at attach); all come before any comes again.
    """
    generator = random.Random(seed)
    shuffled = sorted(events)
    generator.shuffle(shuffled)
    due, kills = cycle(shuffled), []
    places: Iterator[Place] = cycle(("events", "checkpoint", "events", "start", "events", "gradients"))
    for place in islice(places, count):
        share = generator.random()
        if place == "events" and events:
            kills.append(Kill(next(due), place, share))
        elif place == "checkpoint" and total >= every:
            kills.append(Kill(every * generator.randint(1, total // every), place, share))
        else:
            kills.append(Kill(generator.randint(1, total), "gradients" if place == "gradients" else "start", share))
    order: list[Place] = ["start", "gradients", "events", "checkpoint"]
    return sorted(kills, key=lambda kill: (kill.step, order.index(kill.place), kill.share))


class Executioner:
    """Kills this process where a Kill says, and nowhere else; `journal` gets a line of where it was."""

    def __init__(self, kill: Kill | None, journal: Path) -> None:
        self._kill, self._journal = kill, journal
        self._countdown: _Countdown | None = None

    def pass_by(self, place: Place, step: int) -> None:
        """Before the forward pass of a step ("start"), or after its backward pass ("gradients")."""
        if self._kill is not None and (self._kill.place, self._kill.step) == (place, step):
            self._die(f"before step {step}" if place == "start" else f"in step {step}, before its update")

    def begin_events(self, step: int) -> None:
        """The recipe's events of a step come next; 0 is `attach`."""
        if self._kill is not None and (self._kill.place, self._kill.step) == ("events", step):
            number, what = self._kill.operation, _events(step)
            self._countdown = _Countdown(number, lambda: self._die(f"inside {what}, at operation {number}"))
            self._countdown.__enter__()  # type: ignore[no-untyped-call]

    def end_events(self, step: int) -> None:
        """The events of a step are over."""
        if self._countdown is not None:
            self._countdown.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._die(f"just after {_events(step)}")

    def save(self, path: Path, state: Mapping[str, Any], step: int) -> None:
        """Write a checkpoint as atomically as `save_file` does, and perhaps die at it."""
        if self._kill is None or (self._kill.place, self._kill.step) != ("checkpoint", step):
            atomic_write(path, lambda stream: torch.save(dict(state), stream))
            return
        content = io.BytesIO()
        torch.save(dict(state), content)
        written = int(len(content.getvalue()) * self._kill.share)

        def half(stream: BinaryIO) -> None:
            stream.write(content.getvalue()[:written])
            stream.flush()
            self._die(f"writing the checkpoint of step {step}, {written} of {len(content.getvalue())} bytes")

        atomic_write(path, half)

    def _die(self, where: str) -> NoReturn:
        with self._journal.open("a") as stream:
            stream.write(f"{where}\n")
            stream.flush()
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
