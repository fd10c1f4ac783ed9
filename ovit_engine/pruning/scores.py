"""Methods that score weights one by one: OBD and GrW, from a running sum over the gradients, and magnitude.

Memory is a few numbers a weight, time that of reading the gradients. Survivors are not moved. Sums are kept in float64,
where neither squares overflow nor thousands of small terms are lost.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ovit_engine.pruning.allocation import remove_lowest_scores
from ovit_engine.pruning.memory import Memory
from ovit_engine.pruning.problem import Advance, Options, Problem, Solver


class Scored(Solver[Tensor]):
    """A score for each weight, shaped as the weights; the lowest go, and the others stay as they are."""

    advice = "leave it out of the targets"

    @classmethod
    def moves(cls, options: Options) -> bool:
        return False

    @classmethod
    def choose(cls, problem: Problem, candidates: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
        return remove_lowest_scores(problem, candidates)


class GradientScored(Scored):
    """A score from the norm of each weight's gradients over the samples, in float64."""

    power: ClassVar[int]  # sum of |g| ** power

    def __init__(self, problem: Problem, count: int) -> None:
        super().__init__(problem, count)
        self._sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in problem.weights]

    @classmethod
    def memory(cls, shapes: Sequence[torch.Size], options: Options, count: int) -> Memory:
        """Held: the sum. Besides: the scores and their ranking. All in float64."""
        numels = [shape.numel() for shape in shapes]
        return Memory([8 * numel for numel in numels], sum(numels) * 3 * 8)

    def observe(self, chunk: Sequence[Tensor]) -> None:
        for total, gradients in zip(self._sums, chunk, strict=True):
            norm = torch.linalg.vector_norm(gradients.to(total.device), self.power, dim=0, dtype=torch.float64)
            total += norm**self.power

    def candidates(self, advance: Advance) -> list[Tensor]:
        scores = []
        for weight, total in zip(self._problem.weights, self._sums, strict=True):
            scores.append(self.score(weight.double(), total))
            advance(weight.numel())
        return scores

    @abstractmethod
    def score(self, weight: Tensor, total: Tensor) -> Tensor:
        """Return what removing each weight costs, from its value and its sum."""


class Obd(GradientScored):
    """Optimal brain damage with the diagonal of the empirical Fisher (WF-1): 1/2 w_i^2 (damp + mean g_i^2)."""

    power = 2

    def score(self, weight: Tensor, total: Tensor) -> Tensor:
        curvature = self._problem.options.damp + total / self._count
        return weight.square() * curvature / 2


class GradWeight(GradientScored):
    """GrW (arXiv 2210.09223, eq. 9): sum over gradients of |w_i g_i|, the absolute value inside of the sum."""

    power = 1

    def score(self, weight: Tensor, total: Tensor) -> Tensor:
        return weight.abs() * total


class Magnitude(Scored):
    """Score |w|, summed over the weights of a tile. Ties go by position, tensor after tensor."""

    needs_gradients = False

    @classmethod
    def memory(cls, shapes: Sequence[torch.Size], options: Options, count: int) -> Memory:
        """Besides: scores, their ranking and the outcome."""
        return Memory([0] * len(shapes), sum(shape.numel() for shape in shapes) * 16)

    @classmethod
    def choose(cls, problem: Problem, candidates: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
        """Remove the smallest; half the squared length of what was removed is the error."""
        masks, _ = remove_lowest_scores(problem, candidates)
        gone = [torch.where(mask, 0, weight) for mask, weight in zip(masks, problem.weights, strict=True)]
        return masks, [float(each.double().square().sum() / 2) for each in gone]

    def candidates(self, advance: Advance) -> list[Tensor]:
        """Return |w| of each weight, in float32 or better."""
        advance(sum(weight.numel() for weight in self._problem.weights))
        return [weight.abs().to(torch.promote_types(weight.dtype, torch.float32)) for weight in self._problem.weights]
