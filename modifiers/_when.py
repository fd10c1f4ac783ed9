"""When a pruner prunes, and how much each time: `start`, `end` and `every` with the three forms of an amount."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import Field

from ovit_engine.modifier import Modifier, Time
from ovit_engine.modifiers._amount import SparsityRange, SparsitySteps
from ovit_engine.schedule import Clock, Schedule

Given = float | SparsityRange | SparsitySteps | None


class ScheduledModifier(Modifier):
    """Acts at steps that its times and amounts spell."""

    start: Time = Field("0ep", description="time of the first pruning step")
    end: Time | None = Field(None, description="time of the last one, with a sparsity range")
    every: Time | None = Field(None, description="time between pruning steps, with a sparsity range")

    def check_times(self, amounts: Sequence[Given]) -> None:
        """Raise ValueError where `start`, `end` and `every` do not go with the forms of the amounts."""
        ranged = any(isinstance(amount, SparsityRange) for amount in amounts)
        if ranged and (self.end is None or self.every is None):
            raise ValueError(
                "a sparsity range needs 'end' and 'every': when the last pruning step is, and the time between"
            )
        if not ranged and (self.end is not None or self.every is not None):
            raise ValueError(
                "'end' and 'every' go with a sparsity range {from, to}: one sparsity is one pruning step, at 'start'"
            )
        listed = [isinstance(amount, SparsitySteps) for amount in amounts]
        if listed and all(listed) and "start" in self.model_fields_set:
            raise ValueError("'start' does not go with a sparsity for each time: the times say when")

    def scheduled(self, clock: Clock, amount: Given, option: str) -> dict[int, float | None]:
        """Pruning steps of an amount, and the sparsity after each (None = what the pattern implies), in order."""
        if isinstance(amount, SparsitySteps):
            return self._listed(clock, amount.steps, option)
        start = clock.steps(self.start)
        self.check_end(clock, start, "start")
        if not isinstance(amount, SparsityRange):
            return {start: amount}
        assert self.end is not None
        assert self.every is not None
        end, every = clock.steps(self.end), clock.steps(self.every)
        self.check_end(clock, end, "end")
        if end < start:
            raise self.error(f"{self.end!r} comes before the start at {self.start!r}", "end")
        if every < 1:
            raise self.error(f"{self.every!r} is less than a step of {clock.steps_per_epoch} steps an epoch", "every")
        schedule = Schedule(amount.initial, amount.final, amount.curve)
        times = [*range(start, end, every), end]
        return {step: schedule.value((step - start) / (end - start) if end > start else 1.0) for step in times}

    def _listed(self, clock: Clock, steps: Mapping[str, float], option: str) -> dict[int, float | None]:
        timed = [(clock.steps(time), time, value) for time, value in steps.items()]
        for (step, time, value), (next_step, next_time, next_value) in pairwise(timed):
            if next_step <= step:
                raise self.error(f"{next_time!r} does not come after {time!r}", option)
            if next_value < value:
                raise self.error(f"sparsity falls from {value:g} at {time} to {next_value:g} at {next_time}", option)
        last_step, last_time, _ = timed[-1]
        if last_step > clock.total_steps:
            raise self.too_short(f"{last_time!r} is past the end of training at step {clock.total_steps}", option)
        return {step: value for step, _, value in timed}


def spelled(amount: Given) -> list[Any]:
    """The sparsities that an amount names."""
    if isinstance(amount, SparsityRange):
        return [amount.initial, amount.final]
    return list(amount.steps.values()) if isinstance(amount, SparsitySteps) else [amount]
