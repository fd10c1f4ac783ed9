"""When sparse training moves what is part of the model, and how much of it: the times that SViTE and S2ViTE share."""

from collections.abc import Iterable

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor
from torch.optim import Optimizer

from ovit_engine import Clock, Scheduled, Slot, Time
from ovit_engine.core.schedule import Schedule


class UpdatingModifier(Scheduled):
    """Moves a share of what is on at each update, less and less along a cosine, until `end`."""

    every: Time = Field(description="time between two updates, in which a share of what is on changes places")
    end: Time = Field("80%", description="time from which it stays")
    drop: float = Field(0.5, gt=0, le=1, description="share of what is on that an update moves, at the start")
    drop_end: float = Field(
        0.005, ge=0, le=1, description="the same at the end of training, to which a cosine leads; end may come before"
    )
    gradients: PositiveInt = Field(1, description="steps before an update whose gradients count")

    @model_validator(mode="after")
    def _falling(self) -> "UpdatingModifier":
        if self.drop_end > self.drop:
            raise ValueError(f"the share that moves falls: 'drop' is {self.drop:g}, 'drop_end' {self.drop_end:g}")
        return self

    def updates(self, clock: Clock) -> range:
        """The steps at whose end something moves; RecipeError where there is none, or too little time before one."""
        end, every = self.time_of(clock, "end"), self.interval_of(clock, "every")
        if every >= end:
            raise self.too_short(
                f"no update comes before the end at {self.end!r}, step {end}: update more often", "every"
            )
        if self.gradients > every:
            raise self.error(f"{self.gradients} gradients are more than the {every} steps between updates", "gradients")
        return range(every, end, every)

    def share(self, step: int, clock: Clock) -> float:
        """Which share of what is on moves in an update at `step`."""
        return Schedule(self.drop, self.drop_end, "cosine").value(step / clock.total_steps)


@torch.no_grad()
def forget(optimizers: Iterable[Optimizer], slot: Slot, revived: Tensor) -> None:
    """Zero what optimizers remember of single weights: momentum, exp_avg, exp_avg_sq, max_exp_avg_sq and the like."""
    parameter = slot.tensor
    where = slot.scatter(revived)
    # ZeroRedundancyOptimizer keeps what it remembers in an optimizer inside
    for optimizer in (inner for each in optimizers for inner in (each, getattr(each, "optim", None)) if inner):
        for memory in optimizer.state.get(parameter, {}).values():
            if isinstance(memory, Tensor) and memory.shape == parameter.shape:
                memory.masked_fill_(where.to(memory.device), 0)
