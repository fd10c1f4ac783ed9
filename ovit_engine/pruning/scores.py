"""Methods that know weights one by one, from a running sum over the gradients: OBD and GrW.

Memory is one number a weight, time that of reading the gradients. Survivors are not moved. Sums are kept in float64,
where neither squares overflow nor thousands of small terms are lost.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ovit_engine.pruning.allocation import lowest_scores_go
from ovit_engine.pruning.memory import Memory
from ovit_engine.pruning.problem import EVERY_UPDATE, Advance, Options, Problem


class Accumulated(ABC):
    """A score from the norm of each weight's gradients over the samples."""

    needs_gradients: ClassVar[bool] = True
    updates: ClassVar[tuple[str, ...]] = EVERY_UPDATE  # none is read
    advice: ClassVar[str] = "leave it out of the targets"
    stage: ClassVar[str] = "score"
    power: ClassVar[int]  # sum of |g| ** power

    def __init__(self, problem: Problem, count: int) -> None:
        self._problem = problem
        self._count = count
        self._sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in problem.weights]

    @classmethod
    def memory(cls, shapes: Sequence[torch.Size], options: Options, count: int) -> Memory:
        """Held: the sum. Besides: the scores and their ranking. All in float64."""
        numels = [shape.numel() for shape in shapes]
        return Memory([8 * numel for numel in numels], sum(numels) * 3 * 8)

    @classmethod
    def moves(cls, options: Options) -> bool:
        """Never."""
        return False

    @classmethod
    def choose(cls, problem: Problem, candidates: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
        """The lowest scores go."""
        return lowest_scores_go(problem, candidates)

    def observe(self, chunk: Sequence[Tensor]) -> None:
        """Take gradients [k, *shape]."""
        for total, gradients in zip(self._sums, chunk, strict=True):
            norm = torch.linalg.vector_norm(gradients.to(total.device), self.power, dim=0, dtype=torch.float64)
            total += norm**self.power

    def candidates(self, advance: Advance) -> list[Tensor]:
        """The score of each weight, shaped as the weights, in float64."""
        scores = []
        for weight, total in zip(self._problem.weights, self._sums, strict=True):
            scores.append(self.score(weight.double(), total))
            advance(weight.numel())
        return scores

    def move(self, masks: Sequence[Tensor], candidates: Sequence[Tensor], advance: Advance) -> list[Tensor]:
        """Never called."""
        raise AssertionError("survivors stay where they are")

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


class Magnitude:
    """Score |w|, summed over the weights of a tile. Ties go by position, tensor after tensor."""

    needs_gradients: ClassVar[bool] = False
    updates: ClassVar[tuple[str, ...]] = EVERY_UPDATE  # none is read
    advice: ClassVar[str] = "leave it out of the targets"
    stage: ClassVar[str] = "score"

    def __init__(self, problem: Problem, count: int) -> None:
        self._problem = problem

    @classmethod
    def memory(cls, shapes: Sequence[torch.Size], options: Options, count: int) -> Memory:
        """Scores, their ranking and the outcome."""
        return Memory([0] * len(shapes), sum(shape.numel() for shape in shapes) * 16)

    @classmethod
    def moves(cls, options: Options) -> bool:
        """Never."""
        return False

    @classmethod
    def choose(cls, problem: Problem, candidates: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
        """The smallest go; half the squared length of what went is the error."""
        masks, _ = lowest_scores_go(problem, candidates)
        gone = [torch.where(mask, 0, weight) for mask, weight in zip(masks, problem.weights, strict=True)]
        return masks, [float(each.double().square().sum() / 2) for each in gone]

    def observe(self, chunk: Sequence[Tensor]) -> None:
        """Never called."""
        raise AssertionError("magnitude takes no gradients")

    def candidates(self, advance: Advance) -> list[Tensor]:
        """|w| of each weight, in float32 or better."""
        advance(sum(weight.numel() for weight in self._problem.weights))
        return [weight.abs().to(torch.promote_types(weight.dtype, torch.float32)) for weight in self._problem.weights]

    def move(self, masks: Sequence[Tensor], candidates: Sequence[Tensor], advance: Advance) -> list[Tensor]:
        """Never called."""
        raise AssertionError("survivors stay where they are")
