"""oViT (arXiv 2210.09223, also known as CAP): correlation-aware greedy pruning with an exact joint update.

One event: gather the block-diagonal inverse Fisher from gradients (`block_inverse`), order the weights of every block
by greedy elimination (`eliminate`), decide how many each block loses (`allocate`), move the survivors (`update`).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ovit_engine.pattern import NM
from ovit_engine.second_order.allocate import rank, take_lowest
from ovit_engine.second_order.block_inverse import BlockInverse
from ovit_engine.second_order.blocks import a_few
from ovit_engine.second_order.eliminate import BEYOND_QUOTA, eliminate
from ovit_engine.second_order.fisher import sound_inverse
from ovit_engine.second_order.options import Options
from ovit_engine.second_order.problem import Problem, Pruned
from ovit_engine.second_order.update import joint_change


class Ovit:
    """Observe all gradients, solve, done: `solve` frees the inverse Fisher."""

    needs_gradients: ClassVar[bool] = True
    updates: ClassVar[tuple[str, ...]] = ("joint", "none")
    advice: ClassVar[str] = "use a smaller block or fewer targets"

    def __init__(self, problem: Problem, count: int) -> None:
        self._problem = problem
        self._fisher = BlockInverse(problem, count)
        self._is_sound = [
            torch.ones(segment.count, dtype=torch.bool, device=inverse.device)
            for segment, inverse in zip(self._fisher.segments, self._fisher.inverse, strict=True)
        ]

    @staticmethod
    def memory(shapes: Sequence[torch.Size], options: Options, count: int) -> int:
        """That of the inverse Fisher."""
        return BlockInverse.memory(shapes, options, count)

    def observe(self, chunk: Sequence[Tensor]) -> None:
        """Take gradients [k, *shape]."""
        self._fisher.observe(chunk)

    def solve(self) -> Pruned:
        """Masks, weights and the predicted increase of the loss."""
        self._fisher.finish()
        orders, costs = self._eliminate_all()
        removals = self._allocate(costs)
        errors = [0.0] * len(self._problem.weights)
        for segment, cost, removal in zip(self._fisher.segments, costs, removals, strict=True):
            errors[segment.tensor] += float(cost.masked_fill(~removal, 0).sum(dtype=torch.float64))
        costs.clear()
        masks = self._masks(orders, removals)
        moves = self._problem.options.update == "joint"
        return Pruned(masks, self._fisher.move(masks, self._change if moves else None), errors)

    def _eliminate_all(self) -> tuple[list[Tensor], list[Tensor]]:
        """Order (int16) and cost [blocks, units] of every segment, in main memory."""
        unit = self._problem.options.pattern.unit
        orders, costs = [], []
        for number, segment in enumerate(self._fisher.segments):
            shape = (segment.count, segment.size // unit)
            order = torch.zeros(shape, dtype=torch.int16, device="cpu")
            cost = torch.full(shape, BEYOND_QUOTA, dtype=self._problem.options.dtype, device="cpu")
            inverse = self._fisher.inverse[number]
            for here in self._fisher.chunks(number):
                blocks = torch.arange(here.start, here.stop, device=inverse.device)
                first, price, sound = self._eliminate(number, blocks, inverse[here])
                rows = blocks.cpu().unsqueeze(1), torch.arange(first.shape[1]).unsqueeze(0)
                order[rows], cost[rows] = first.to("cpu", torch.int16), price.cpu()
                for few in a_few(blocks[~sound]):
                    self._eliminate_again(number, few, order, cost)
            orders.append(order)
            costs.append(cost)
        return orders, costs

    def _eliminate_again(self, number: int, blocks: Tensor, order: Tensor, cost: Tensor) -> None:
        """Blocks whose condition is beyond float32, in float64 and with H made positive definite."""
        self._is_sound[number][blocks] = False
        inverse = sound_inverse(self._fisher.inverse[number][blocks], self._fisher.lowest(number)[blocks])
        first, price, _ = self._eliminate(number, blocks, inverse)
        if not bool(price.isfinite().all()):
            name = self._problem.names[self._fisher.segments[number].tensor]
            raise FloatingPointError(f"{name}: elimination does not stay finite in float64")
        cost[blocks.cpu()] = BEYOND_QUOTA
        rows = blocks.cpu().unsqueeze(1), torch.arange(first.shape[1]).unsqueeze(0)
        order[rows], cost[rows] = first.to("cpu", torch.int16), price.clamp(max=torch.finfo(cost.dtype).max).to(cost)

    def _eliminate(self, number: int, blocks: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Order, cost and soundness of some blocks of a segment, in the precision of their H."""
        segment, pattern = self._fisher.segments[number], self._problem.options.pattern
        index, unit = segment.tensor, pattern.unit
        alive = segment.cut(self._fisher.kept[index])[blocks].reshape(len(blocks), -1, unit).any(2)
        quota = None
        if isinstance(pattern, NM):
            groups = self._problem.group_quotas(index).repeat_interleave(pattern.group)
            quota = segment.cut(groups)[blocks, :: pattern.group]
        weights = self._fisher.weights(number)[blocks].to(inverse.dtype)
        floor = self._fisher.floor(number)[blocks].to(inverse.dtype)
        return eliminate(inverse, weights, alive, floor, unit=unit, quota=quota)

    def _allocate(self, costs: list[Tensor]) -> list[Tensor]:
        """Which steps [blocks, units] of each segment's order are taken."""
        options = self._problem.options
        if isinstance(options.pattern, NM):
            return [cost >= 0 for cost in costs]
        removals: list[Tensor] = []
        for scope, count in self._problem.quotas():
            members = [
                cost for segment, cost in zip(self._fisher.segments, costs, strict=True) if segment.tensor in scope
            ]
            removals += take_lowest([rank(cost, options.rule) for cost in members], count)
        return removals

    def _masks(self, orders: list[Tensor], removals: list[Tensor]) -> list[Tensor]:
        """Masks after the steps that are taken."""
        pattern = self._problem.options.pattern
        kept = [flat.clone() for flat in self._fisher.kept]
        for number, (segment, order, removal) in enumerate(zip(self._fisher.segments, orders, removals, strict=True)):
            part = segment.cut(kept[segment.tensor])
            for here in self._fisher.chunks(number):
                part[here] &= ~_removed(order[here], removal[here], pattern.unit).to(part.device)
        return [
            pattern.from_layout(flat, weight.shape) for flat, weight in zip(kept, self._problem.weights, strict=True)
        ]

    def _change(self, number: int, here: slice, removed: Tensor) -> Tensor:
        sound = self._is_sound[number][here]
        if bool(sound.all()):
            return self._fisher.joint_change(number, here, removed)
        weights = self._fisher.weights(number)[here].to(self._problem.options.dtype)
        inverse, lowest = self._fisher.inverse[number][here], self._fisher.lowest(number)[here]
        change = torch.empty_like(weights)
        change[sound] = joint_change(inverse[sound], weights[sound], removed[sound], lowest[sound])
        for few in a_few((~sound).nonzero().squeeze(1)):
            exact = sound_inverse(inverse[few], lowest[few])
            change[few] = joint_change(exact, weights[few].double(), removed[few], lowest[few]).to(change)
        return change


def _removed(order: Tensor, removal: Tensor, unit: int) -> Tensor:
    """Weights [blocks, units * unit] that go, from the steps that are taken."""
    removed = torch.zeros_like(removal)
    block, step = removal.nonzero(as_tuple=True)
    removed[block, order[block, step].long()] = True
    return removed.repeat_interleave(unit, dim=1)
