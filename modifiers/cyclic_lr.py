"""The cyclic learning rate of oViT: back to its maximum on the first step after each pruning step."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from pydantic import Field, PositiveFloat, PrivateAttr, model_validator
from torch import Tensor

from ovit_engine import Claim, Clock, Exclusive, LearningRate, Row, Run, Scheduled, Time, register
from ovit_engine.core.schedule import CurveName, Cyclic, Schedule
from ovit_engine.core.training_length import is_nearly_done
from ovit_engine.utils.warn import warn


@register("cyclic_lr")
class CyclicLR(LearningRate, Scheduled, Exclusive):
    """Writes the learning rate: from `max` towards `min` in each period (eq. 8), never zero.

    Parameter groups keep the ratios that they had when the optimizer was attached: `max` and `min` are the learning
    rates of the first optimizer's first group.
    """

    start: Time = Field("0ep", description="time of the first step whose learning rate is ours")
    end: Time = Field("100%", description="time of the first step whose learning rate is no longer ours")
    period: Time | None = Field(
        None, description="length of a cycle, as a rule the pruning interval; without it one cycle"
    )
    warmup: Time | None = Field(None, description="length of a linear rise from near 0 in the first cycle")
    max: PositiveFloat = Field(description="learning rate on the first step of each cycle")
    min: PositiveFloat = Field(description="learning rate that each cycle falls towards")
    curve: CurveName = Field("linear", description="linear as published, cubic or cosine; constant holds max")

    _cyclic: Cyclic | None = PrivateAttr(default=None)
    _span: tuple[int, int] = PrivateAttr(default=(0, 0))
    _ratios: list[list[float]] = PrivateAttr(default_factory=list)
    _reference: float = PrivateAttr(default=1.0)  # the learning rate that ratios are to
    _written: list[list[float]] = PrivateAttr(default_factory=list)
    _warned: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _falls(self) -> "CyclicLR":
        if self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self

    def _resolve(self, clock: Clock) -> tuple[Cyclic, int, int]:
        start, end = clock.steps(self.start), self.time_of(clock, "end")
        if end <= start:
            raise self.error(f"{self.end!r} does not come after the start at {self.start!r}", "end")
        period = end - start if self.period is None else self.interval_of(clock, "period")
        warmup = 0 if self.warmup is None else clock.steps(self.warmup)
        if warmup >= min(period, end - start):
            raise self.error(
                f"{self.warmup!r} is not shorter than a cycle of {min(period, end - start)} steps", "warmup"
            )
        final, curve = (self.max, "linear") if self.curve == "constant" else (self.min, self.curve)
        return Cyclic(Schedule(self.max, final, curve), period, warmup), start, end

    def timeline(self, clock: Clock) -> Iterable[Row]:
        cyclic, start, end = self._resolve(clock)
        if cyclic.warmup:
            risen = cyclic.value(cyclic.warmup - 1)
            yield start, "learning rate", f"{cyclic.value(0):.3g} -> {risen:.3g} (warm-up)"
        for step in range(start, end, cyclic.period):
            last = min(step + cyclic.period, end) - 1
            first = step + (cyclic.warmup if step == start else 0)
            high, low = f"{cyclic.value(first - start):.3g}", f"{cyclic.value(last - start):.3g}"
            yield first, "learning rate", f"{high} -> {low} ({self.curve})" if high != low else high

    def prepare(self, run: Run) -> None:
        self._cyclic, *span = self._resolve(run.clock)
        self._span = (span[0], span[1])

    def claims(self, run: Run) -> Iterable[Claim]:
        yield Claim("learning rate", "", self._span[0], self._span[1] - 1)

    def attach(self, run: Run) -> None:
        if not self._ratios:
            rates = [[_number(group["lr"]) for group in optimizer.param_groups] for optimizer in run.optimizers]
            reference = rates[0][0]
            if reference <= 0:
                raise self.error("the optimizer's first group has learning rate 0: groups keep their ratios to it")
            self._reference = reference
            self._ratios = [[rate / reference for rate in groups] for groups in rates]
        saved = [len(groups) for groups in self._ratios]
        present = [len(optimizer.param_groups) for optimizer in run.optimizers]
        if len(saved) != len(present) or any(a > b for a, b in zip(saved, present, strict=True)):
            raise self.error(
                f"the state that was loaded is of optimizers with {saved} parameter groups, here they have {present}"
            )

    def write_rates(self, run: Run) -> None:
        if not self._span[0] <= run.step < self._span[1]:
            return
        assert self._cyclic is not None
        self._add_groups(run)
        self._check_rival(run)
        rate = self._cyclic.value(run.step - self._span[0])
        self._written = []
        for optimizer, ratios in zip(run.optimizers, self._ratios, strict=True):
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                if isinstance(group["lr"], Tensor):  # a compiled step reads this tensor
                    group["lr"].fill_(rate * ratio)
                else:
                    group["lr"] = rate * ratio
            self._written.append([_number(group["lr"]) for group in optimizer.param_groups])

    def _add_groups(self, run: Run) -> None:
        """Take in groups that the user added since, at the ratio they came with."""
        for index, (optimizer, ratios) in enumerate(zip(run.optimizers, self._ratios, strict=True)):
            added = [_number(group["lr"]) for group in optimizer.param_groups[len(ratios) :]]
            ratios += [rate / self._reference for rate in added]
            if self._written:
                self._written[index] += added

    def detach(self, run: Run) -> None:
        if run.step < self._span[1] and not is_nearly_done(run):
            self.finish_late(run, "the end of the learning-rate schedule")

    def _check_rival(self, run: Run) -> None:
        if self._warned or not self._written:
            return
        found = [_number(group["lr"]) for optimizer in run.optimizers for group in optimizer.param_groups]
        pairs = zip(chain.from_iterable(self._written), found, strict=True)
        before, now = next(((before, now) for before, now in pairs if before != now), (0.0, 0.0))
        if before != now:
            warn(
                f"{self.name}: something else changed the learning rate from {before:g} to {now:g} (a scheduler?); "
                "the recipe's value is used at every step"
            )
            self._warned = True

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self._reference, "ratios": [list(groups) for groups in self._ratios]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._reference = state["reference"]
        self._ratios = [list(groups) for groups in state["ratios"]]


def _number(rate: float | Tensor) -> float:
    return float(rate)
