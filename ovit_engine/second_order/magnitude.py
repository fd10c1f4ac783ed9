"""Magnitude pruning: the smallest weights go, the others stay where they are. The baseline of everything else."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ovit_engine.second_order.choose import prune_lowest
from ovit_engine.second_order.options import Options
from ovit_engine.second_order.problem import EVERY_UPDATE, Problem, Pruned


class Magnitude:
    """Score |w|, summed over the weights of a tile. Ties go by position, tensor after tensor."""

    needs_gradients: ClassVar[bool] = False
    updates: ClassVar[tuple[str, ...]] = EVERY_UPDATE  # none is read
    advice: ClassVar[str] = "use fewer targets"

    def __init__(self, problem: Problem, count: int) -> None:
        self._problem = problem

    @staticmethod
    def memory(shapes: Sequence[torch.Size], options: Options, count: int) -> int:
        """Scores, their ranking and the outcome."""
        return sum(shape.numel() for shape in shapes) * 16

    def observe(self, chunk: Sequence[Tensor]) -> None:
        """Never called."""
        raise AssertionError("magnitude takes no gradients")

    def solve(self) -> Pruned:
        """Masks, and the weights under them."""
        weights = self._problem.weights
        sizes = [weight.abs().to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
        pruned = prune_lowest(self._problem, sizes)
        gone = [(old - new).double().square().sum() / 2 for old, new in zip(weights, pruned.weights, strict=True)]
        return replace(pruned, errors=[float(each) for each in gone])
