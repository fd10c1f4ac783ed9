"""Observers: from the tensors seen to the range that a quantizer covers.

An observer is a frozen, stateless rule; the range itself lives in the quantizer's buffers, so that checkpoints, EMA
copies and compiled graphs carry it. A new rule is a new subclass and no change anywhere else.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ovit_engine.quant.functional import IntegerGrid
from ovit_engine.quant.range_search import extremes, least_error_range, percentile_range


class Observer(ABC):
    """How a quantizer's range follows the tensors it sees."""

    # activations are watched while the model trains; a weight's range belongs to its present value at any time
    only_in_training: bool

    @abstractmethod
    def update(
        self, x: Tensor, minimum: Tensor, maximum: Tensor, observed: Tensor, axis: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return the new (minimum, maximum) after `x`; `observed` (0-d bool) is false for the first tensor."""


@dataclass(frozen=True)
class MinMax(Observer):
    """The extremes of all tensors seen."""

    only_in_training = True

    def update(
        self, x: Tensor, minimum: Tensor, maximum: Tensor, observed: Tensor, axis: int | None
    ) -> tuple[Tensor, Tensor]:
        low, high = extremes(x, axis)
        return (
            torch.where(observed, torch.minimum(minimum, low), low),
            torch.where(observed, torch.maximum(maximum, high), high),
        )


@dataclass(frozen=True)
class Averaged(Observer):
    """Exponential moving average of a range taken of each batch; the first batch initialises it."""

    momentum: float = 0.05
    only_in_training = True

    @abstractmethod
    def range_of(self, x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
        """Return (minimum, maximum) of one batch."""

    def update(
        self, x: Tensor, minimum: Tensor, maximum: Tensor, observed: Tensor, axis: int | None
    ) -> tuple[Tensor, Tensor]:
        low, high = self.range_of(x, axis)
        return (
            torch.where(observed, minimum + self.momentum * (low - minimum), low),
            torch.where(observed, maximum + self.momentum * (high - maximum), high),
        )


@dataclass(frozen=True)
class MovingAverageMinMax(Averaged):
    """Average of each batch's extremes."""

    def range_of(self, x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
        return extremes(x, axis)


@dataclass(frozen=True)
class Percentile(Averaged):
    """Average of each batch's percentiles: of 10,000 values 99.99 leaves out the largest and the smallest."""

    percentile: float = 99.99

    def range_of(self, x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
        return percentile_range(x, self.percentile, axis)


@dataclass(frozen=True)
class LeastError(Averaged):
    """Average of the ranges that would round each batch with the least squared error."""

    grid: IntegerGrid | None = None

    def range_of(self, x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
        assert self.grid is not None
        return least_error_range(x, self.grid, axis)


@dataclass(frozen=True)
class CurrentMinMax(Observer):
    """The extremes of the present tensor: with a symmetric grid, abs-max of a live weight."""

    only_in_training = False

    def update(
        self, x: Tensor, minimum: Tensor, maximum: Tensor, observed: Tensor, axis: int | None
    ) -> tuple[Tensor, Tensor]:
        return extremes(x, axis)


@dataclass(frozen=True)
class CurrentLeastError(Observer):
    """The range that rounds the present tensor with the least squared error."""

    grid: IntegerGrid
    only_in_training = False

    def update(
        self, x: Tensor, minimum: Tensor, maximum: Tensor, observed: Tensor, axis: int | None
    ) -> tuple[Tensor, Tensor]:
        return least_error_range(x, self.grid, axis)
