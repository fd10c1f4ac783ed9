"""oBERT (arXiv 2203.07259) and M-FAC (arXiv 2107.03356): each unit scored as if it were the only one removed.

A unit G (one weight, or the tile of a block pattern) costs 1/2 w_G^T (H_GG)^-1 w_G. The lowest go, all at once.
Survivors move by the exact group formula ("joint"), or as published by the sum of what each removal alone asks
("independent"), which at high sparsity is often worse than moving nobody. The published 1e-7 in denominators is left
out: H_jj is never below 1 / F_jj.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ovit_engine.pruning.allocation import remove_lowest
from ovit_engine.pruning.block_inverse import BlockInverse
from ovit_engine.pruning.blocks import Segment
from ovit_engine.pruning.eliminate import lower_factors
from ovit_engine.pruning.matrix_free import MatrixFree
from ovit_engine.pruning.memory import Memory
from ovit_engine.pruning.problem import Advance, Options, Problem, Solver


class Obert(Solver[Tensor]):
    """Score, choose, move; a subclass states how the inverse Fisher is held."""

    inverse_type: ClassVar[type[BlockInverse | MatrixFree]] = BlockInverse

    def __init__(self, problem: Problem, count: int) -> None:
        super().__init__(problem, count)
        self._fisher = self.inverse_type(problem, count)

    @classmethod
    def memory(cls, shapes: Sequence[torch.Size], options: Options, count: int) -> Memory:
        return cls.inverse_type.memory(shapes, options, count)

    @classmethod
    def choose(cls, problem: Problem, candidates: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
        """Remove the lowest; the sum of what they cost is the error."""
        pattern = problem.options.pattern
        masks = remove_lowest(problem, candidates)
        errors = []
        for cost, before, after in zip(candidates, problem.masks, masks, strict=True):
            went = pattern.to_layout(before & ~after).reshape(-1, pattern.unit).any(1)
            errors.append(float(cost[went].sum(dtype=torch.float64)))
        return masks, errors

    def observe(self, chunk: Sequence[Tensor]) -> None:
        self._fisher.observe(chunk)

    def candidates(self, advance: Advance) -> list[Tensor]:
        """Cost of each unit alone, [units] a tensor."""
        self._fisher.finish()
        unit, dtype = self._problem.options.pattern.unit, self._problem.options.dtype
        costs = [
            torch.zeros(weight.numel() // unit, dtype=dtype, device=weight.device) for weight in self._problem.weights
        ]
        for number, segment in enumerate(self._fisher.segments):
            in_units = Segment(segment.tensor, segment.offset // unit, segment.count, segment.size // unit)
            for here in self._fisher.chunks(number):
                cost, _ = self._single_removals(number, here)
                in_units.cut(costs[segment.tensor])[here] = cost.to(dtype)
                advance((here.stop - here.start) * segment.size)
        return costs

    def move(self, masks: Sequence[Tensor], candidates: Sequence[Tensor], advance: Advance) -> list[Tensor]:
        """Return new weights, moved as the option `update` says."""
        self._fisher.finish()
        is_joint = self._problem.options.update == "joint"
        return self._fisher.move(masks, self._fisher.joint_change if is_joint else self._independent_change, advance)

    def _single_removals(self, number: int, here: slice) -> tuple[Tensor, Tensor]:
        """Cost of each unit [c, units], and (H_GG)^-1 w_G of all of them [c, B]."""
        tiles, floor = self._fisher.tiles(number, here)
        weights = self._fisher.weights(number)[here].to(tiles.dtype)
        if tiles.shape[-1] == 1:
            solution = weights / torch.maximum(tiles.flatten(1), floor)
            return weights * solution / 2, solution
        lower = lower_factors(tiles, floor)
        parts = weights.reshape(*tiles.shape[:3], 1)
        whitened = torch.linalg.solve_triangular(lower, parts, upper=False)
        solution = torch.linalg.solve_triangular(lower.mT, whitened, upper=True)
        return whitened.square().sum((2, 3)) / 2, solution.reshape(weights.shape)

    def _independent_change(self, number: int, here: slice, removed: Tensor) -> Tensor:
        """Minus the sum over removed units of H E_G (H_GG)^-1 w_G."""
        _, solution = self._single_removals(number, here)
        return -self._fisher.multiply(number, here, solution * removed)


class Mfac(Obert):
    """M-FAC: the same without ever forming H; memory is numel * N numbers."""

    advice = "use fewer gradients, or leave it out of the targets"
    inverse_type = MatrixFree
