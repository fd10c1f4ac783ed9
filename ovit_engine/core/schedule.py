"""Time and values: "2.5ep" to whole steps, and curves as pure functions of progress."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator

_TIME = re.compile(r"(\d+(?:\.\d+)?)(st|ep|%)")

_LONGEST = 1e9  # steps or epochs

_TIME_HELP = "write steps '300st', epochs '2.5ep' or a share of training '40%'"

CurveName = Literal["linear", "cubic", "cosine", "constant"]


def check_time(value: object) -> str:
    """Return `value` if it spells a time; raises ValueError that says how to write one."""
    if value == 0 and not isinstance(value, bool):
        return "0st"
    if not isinstance(value, str) or not (found := _TIME.fullmatch(value.strip())):
        raise ValueError(f"{value!r} is no time: {_TIME_HELP}")
    if found[2] == "st" and "." in found[1]:
        raise ValueError(f"{value!r} is no time: steps are whole numbers")
    if float(found[1]) > _LONGEST:
        raise ValueError(f"{value!r} is too long: a time is at most {_LONGEST:g} steps, epochs or percent")
    if found[2] == "%" and float(found[1]) > 100:
        raise ValueError(f"{value!r} is no time: a share of training is at most 100%")
    return value.strip()


Time = Annotated[str, BeforeValidator(check_time)]


@dataclass(frozen=True)
class Clock:
    """The length of training, which turns a spelled time into applied optimizer steps."""

    steps_per_epoch: int
    total_steps: int

    def __post_init__(self) -> None:
        for name, value in (("steps_per_epoch", self.steps_per_epoch), ("total_steps", self.total_steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")

    def steps(self, time: str) -> int:
        """Read "300st", "2.5ep" or "40%" as a whole number of steps, half a step rounded up."""
        found = _TIME.fullmatch(check_time(time))
        assert found
        scale = {"st": 1.0, "ep": float(self.steps_per_epoch), "%": self.total_steps / 100}[found[2]]
        return math.floor(float(found[1]) * scale + 0.5)

    def epochs(self, step: int) -> float:
        """The epoch that `step` stands for."""
        return step / self.steps_per_epoch


def linear(progress: float) -> float:
    """Fraction of the way from start to end at `progress` in [0, 1]."""
    return progress


def cubic(progress: float) -> float:
    """Fast at first, gentle at the end (Zhu and Gupta 2017)."""
    return 1 - (1 - progress) ** 3


def cosine(progress: float) -> float:
    """Half a cosine: gentle at both ends."""
    return (1 - math.cos(math.pi * progress)) / 2


def constant(progress: float) -> float:
    """The final value from the start."""
    return 1.0


CURVES: dict[str, Callable[[float], float]] = {
    "linear": linear,
    "cubic": cubic,
    "cosine": cosine,
    "constant": constant,
}


@dataclass(frozen=True)
class Schedule:
    """A value that moves from `initial` to `final` along a named curve."""

    initial: float
    final: float
    curve: str = "linear"

    def value(self, progress: float) -> float:
        """The value at `progress`, which is held to [0, 1]."""
        share = CURVES[self.curve](min(1.0, max(0.0, progress)))
        return self.initial + (self.final - self.initial) * share


@dataclass(frozen=True)
class Cyclic:
    """A schedule that starts again every `period` steps (oViT eq. 8).

    The value is `schedule.initial` on the first step of each period and never quite `schedule.final`, as the paper has
    it: eta_max - (eta_max - eta_min) (t mod T) / T. The published code divides by T - 1 and zeroes the first step.
    The first `warmup` steps are scaled by a line that rises to 1, never from 0.
    """

    schedule: Schedule
    period: int
    warmup: int = 0

    def value(self, step: int) -> float:
        """The value `step` steps after the first cycle began."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rise * self.schedule.value((step % self.period) / self.period)


def make_clock(steps_per_epoch: int, epochs: int | None, total_steps: int | None) -> Clock:
    """The clock of a training that is so many epochs or so many steps long; ValueError unless one is given."""
    if (epochs is None) == (total_steps is None):
        raise ValueError(f"give either epochs or total_steps, not epochs={epochs!r} and total_steps={total_steps!r}")
    if epochs is None:
        assert total_steps is not None
        return Clock(steps_per_epoch, total_steps)
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise ValueError(f"epochs must be a positive whole number, not {epochs!r}")
    return Clock(steps_per_epoch, steps_per_epoch * epochs)
