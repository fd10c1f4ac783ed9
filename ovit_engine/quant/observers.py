"""Observers: from the tensors seen to the range that a quantizer covers.

An observer is a frozen, stateless rule; the range itself lives in the quantizer's buffers, so that checkpoints, EMA
copies and compiled graphs carry it. A new rule (percentile, MSE) is a new subclass and no change anywhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Observer(ABC):
    """How a quantizer's range follows the tensors it sees."""

    # activations are watched while the model trains; a weight's range belongs to its present value at any time
    only_in_training: bool

    @abstractmethod
    def update(
        self, x: Tensor, minimum: Tensor, maximum: Tensor, observed: Tensor, axis: int | None
    ) -> tuple[Tensor, Tensor]:
        """The new (minimum, maximum) after ``x``; ``observed`` (0-d bool) is false for the first tensor."""


@dataclass(frozen=True)
class MovingAverageMinMax(Observer):
    """Exponential moving average of each batch's extremes; the first batch initialises it."""

    momentum: float = 0.05
    only_in_training = True

    def __post_init__(self) -> None:
        if not 0.0 < self.momentum <= 1.0:
            raise ValueError(f"momentum must lie in (0, 1], got {self.momentum}")

    def update(
        self, x: Tensor, minimum: Tensor, maximum: Tensor, observed: Tensor, axis: int | None
    ) -> tuple[Tensor, Tensor]:
        low, high = _extremes(x, axis)
        return (
            torch.where(observed, minimum + self.momentum * (low - minimum), low),
            torch.where(observed, maximum + self.momentum * (high - maximum), high),
        )


@dataclass(frozen=True)
class CurrentMinMax(Observer):
    """The extremes of the present tensor: with a symmetric grid, abs-max of a live weight."""

    only_in_training = False

    def update(
        self, x: Tensor, minimum: Tensor, maximum: Tensor, observed: Tensor, axis: int | None
    ) -> tuple[Tensor, Tensor]:
        return _extremes(x, axis)


def _extremes(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value: of the tensor (0-d), or of each channel along ``axis`` (1-d)."""
    if axis is None:
        low, high = torch.aminmax(x)
        return low, high
    low, high = torch.aminmax(x.transpose(0, axis).flatten(1), dim=1)
    return low, high
