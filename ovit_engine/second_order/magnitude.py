"""Magnitude pruning: the smallest weights go, the others stay where they are. The baseline of everything else."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ovit_engine.second_order.choose import lowest_scores_go
from ovit_engine.second_order.memory import Memory
from ovit_engine.second_order.options import Options
from ovit_engine.second_order.problem import EVERY_UPDATE, Advance, Problem


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
