"""When a pruner prunes, and how much each time: `start`, `end` and `every` with the three forms of an amount."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from ovit_engine.core.capabilities import Scheduled
from ovit_engine.core.schedule import Clock, CurveName, Schedule, Time

_SAME = 1e-9  # sparsities that differ by less were written as the same number


def _check_sparsity(value: Any) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{value!r} is no sparsity: write a share of zeros such as 0.75") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no sparsity: write a share of zeros such as 0.75")
    if not 0 <= value < 1:
        hint = f": did you mean {value / 100:g}?" if 2 <= value < 100 else ""
        raise ValueError(f"sparsity {value:g} is not in [0, 1){hint}")
    return float(value)


Sparsity = Annotated[float, BeforeValidator(_check_sparsity)]


class SparsityRange(BaseModel):
    """Sparsity that grows from the first pruning step to the last."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid", populate_by_name=True)

    initial: Sparsity = Field(alias="from", description="sparsity after the first pruning step")
    final: Sparsity = Field(alias="to", description="sparsity after the last one")
    curve: CurveName = Field("linear", description="how it grows between them")

    @model_validator(mode="after")
    def _ascending(self) -> "SparsityRange":
        if self.final < self.initial:
            raise ValueError(f"sparsity falls from {self.initial:g} to {self.final:g}: pruned weights do not come back")
        return self


def _check_amount(value: Any) -> Any:
    """Choose between the three forms by shape, so that an error speaks of the form that was written."""
    if isinstance(value, dict) and value and not {"from", "to", "curve", "initial", "final"} & set(map(str, value)):
        return SparsitySteps(steps=value)
    return SparsityRange.model_validate(value) if isinstance(value, dict) else _check_sparsity(value)


class SparsitySteps(BaseModel):
    """A sparsity for each pruning step, by its time."""

    steps: dict[Time, Sparsity]


def _spell_amount(value: Any) -> Any:
    if isinstance(value, SparsitySteps):
        return dict(value.steps)
    return value.model_dump(by_alias=True, exclude_unset=True) if isinstance(value, SparsityRange) else value


Amount = Annotated[
    float | SparsityRange | SparsitySteps, BeforeValidator(_check_amount), PlainSerializer(_spell_amount)
]


class SweepOptions(BaseModel):
    """Sparsities on the way, each of which leaves a checkpoint."""

    model_config = ConfigDict(extra="forbid")

    sparsity: list[Sparsity] = Field(min_length=1, description="the sparsities of which a checkpoint is kept")
    metric: str = Field("accuracy", min_length=1, description="name of the metric by which the best model is chosen")
    best: Literal["max", "min"] = Field("max", description="whether the metric is best where it is high, or low")
    onnx: bool = Field(False, description="export each to ONNX at the end (the bundled trainer)")


def _check_sweep(value: Any) -> Any:
    if not (value is None or isinstance(value, (list, tuple, dict, SweepOptions))):
        raise ValueError(f"{value!r} is no sweep: write a list of sparsities such as [0.5, 0.75]")
    return SweepOptions(sparsity=value) if isinstance(value, (list, tuple)) else value


def _spell_sweep(value: SweepOptions | None) -> Any:
    if value is None:
        return None
    given = value.model_dump(exclude_unset=True)
    return given["sparsity"] if set(given) == {"sparsity"} else given


Sweep = Annotated[SweepOptions | None, BeforeValidator(_check_sweep), PlainSerializer(_spell_sweep)]


def place_targets(scheduled: Mapping[int, float], targets: Sequence[float], *, movable: bool) -> dict[int, float]:
    """The pruning step at which each sparsity of a sweep is reached, in the order of time.

    Args:
        scheduled: sparsity after each pruning step, never falling.
        targets: the sparsities of the sweep.
        movable: whether the nearest step takes over a target; otherwise a target is one of the scheduled sparsities.

    Raises:
        ValueError: a target that no step reaches, or two on one step; it tells the sparsities there are.
    """
    there_are = f"the pruning steps are to {', '.join(f'{value:.4g}' for value in scheduled.values())}"
    lowest, highest = min(scheduled.values()), max(scheduled.values())
    placed: dict[int, float] = {}
    for target in sorted(targets):
        distances = {step: abs(value - target) for step, value in scheduled.items()}
        nearest = min(distances.values())
        if not movable and nearest > _SAME:
            raise ValueError(f"no pruning step is to {target:g}; {there_are}")
        if not lowest - _SAME <= target <= highest + _SAME:
            raise ValueError(f"{target:g} is out of reach; {there_are}")
        last = max(placed, default=-1)
        free = [step for step, away in distances.items() if away <= nearest + _SAME and step > last]
        if not free:
            raise ValueError(
                f"{placed[last]:g} and {target:g} fall on one pruning step, at step {last}: prune more often, or leave "
                f"one out; {there_are}"
            )
        below = [step for step in free if scheduled[step] <= target]
        placed[below[-1] if below else free[0]] = target  # among equal steps that which keeps the order
    return placed


Given = float | SparsityRange | SparsitySteps | None


class PruningSchedule(Scheduled):
    """Prunes at steps that times and amounts spell."""

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
        start = self.time_of(clock, "start")
        if not isinstance(amount, SparsityRange):
            return {start: amount}
        end, every = self.time_of(clock, "end"), self.interval_of(clock, "every")
        if end < start:
            raise self.error(f"{self.end!r} comes before the start at {self.start!r}", "end")
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
