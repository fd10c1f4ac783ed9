"""Magnitude pruning: the smallest weights go, the others stay where they are. The baseline of everything else."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ovit_engine.pattern import NM, unit_scores
from ovit_engine.second_order.allocate import take_lowest
from ovit_engine.second_order.problem import Problem, Pruned


class Magnitude:
    """Score |w|, summed over the weights of a tile. Ties go by position, tensor after tensor."""

    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, count: int) -> None:
        self._problem = problem

    def observe(self, chunk: Sequence[Tensor]) -> None:
        """Never called."""
        raise AssertionError("magnitude takes no gradients")

    def solve(self) -> Pruned:
        """Masks, and the weights under them."""
        problem = self._problem
        masks = self._masks_of_groups() if isinstance(problem.options.pattern, NM) else self._masks_of_units()
        weights = [torch.where(mask, weight, 0) for mask, weight in zip(masks, problem.weights, strict=True)]
        gone = [(old - new).double().square().sum() / 2 for old, new in zip(problem.weights, weights, strict=True)]
        return Pruned(masks, weights, [float(each) for each in gone])

    def _scores(self, index: int) -> Tensor:
        weight = self._problem.weights[index]
        size = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
        return size.masked_fill(~self._problem.masks[index], -torch.inf)

    def _masks_of_groups(self) -> list[Tensor]:
        pattern = self._problem.options.pattern
        return [pattern.mask(self._scores(index)) for index in range(len(self._problem.weights))]

    def _masks_of_units(self) -> list[Tensor]:
        problem, pattern = self._problem, self._problem.options.pattern
        masks = list(problem.masks)
        for scope, count in problem.quotas():
            scores = [unit_scores(pattern, self._scores(index)) for index in scope]
            # Pruned before: not to be taken a second time.
            scores = [each.masked_fill(each.isneginf(), torch.inf).cpu() for each in scores]
            for index, taken in zip(scope, take_lowest(scores, count), strict=True):
                goes = taken.to(masks[index].device).repeat_interleave(pattern.unit)
                masks[index] = masks[index] & ~pattern.from_layout(goes, masks[index].shape)
        return masks
