"""Methods that know weights one by one, from a running sum over the gradients: OBD and GrW.

Memory is one number a weight, time that of reading the gradients. Survivors are not moved. Sums are kept in float64,
where neither squares overflow nor thousands of small terms are lost.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ovit_engine.second_order.choose import prune_lowest
from ovit_engine.second_order.options import Options
from ovit_engine.second_order.problem import EVERY_UPDATE, Problem, Pruned


class Accumulated(ABC):
    """A score from the norm of each weight's gradients over the samples."""

    needs_gradients: ClassVar[bool] = True
    updates: ClassVar[tuple[str, ...]] = EVERY_UPDATE  # none is read
    advice: ClassVar[str] = "use fewer targets"
    power: ClassVar[int]  # sum of |g| ** power

    def __init__(self, problem: Problem, count: int) -> None:
        self._problem = problem
        self._count = count
        self._sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in problem.weights]

    @staticmethod
    def memory(shapes: Sequence[torch.Size], options: Options, count: int) -> int:
        """The sum, the scores and their ranking, in float64."""
        return sum(shape.numel() for shape in shapes) * 4 * 8

    def observe(self, chunk: Sequence[Tensor]) -> None:
        """Take gradients [k, *shape]."""
        for total, gradients in zip(self._sums, chunk, strict=True):
            norm = torch.linalg.vector_norm(gradients.to(total.device), self.power, dim=0, dtype=torch.float64)
            total += norm**self.power

    def solve(self) -> Pruned:
        """Masks, and the weights under them."""
        weights = [weight.double() for weight in self._problem.weights]
        scores = [self.score(weight, total) for weight, total in zip(weights, self._sums, strict=True)]
        return prune_lowest(self._problem, scores)

    @abstractmethod
    def score(self, weight: Tensor, total: Tensor) -> Tensor:
        """What removing each weight costs, from its value and its sum."""


class Obd(Accumulated):
    """Optimal brain damage with the diagonal of the empirical Fisher (WF-1): 1/2 w_i^2 (damp + mean g_i^2)."""

    power = 2

    def score(self, weight: Tensor, total: Tensor) -> Tensor:
        curvature = self._problem.options.damp + total / self._count
        return weight.square() * curvature / 2


class GradWeight(Accumulated):
    """GrW (arXiv 2210.09223, eq. 9): sum over gradients of |w_i g_i|, the absolute value inside of the sum."""

    power = 1

    def score(self, weight: Tensor, total: Tensor) -> Tensor:
        return weight.abs() * total
