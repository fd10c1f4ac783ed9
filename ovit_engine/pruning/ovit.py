"""oViT (arXiv 2210.09223, also known as CAP): correlation-aware greedy pruning with an exact joint update.

One step: gather the block-diagonal inverse Fisher from gradients (`block_inverse`), order the weights of every block
by greedy elimination (`eliminate`), decide how many each block loses (`allocation`), move the survivors (`fisher`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ovit_engine.pruning.allocation import rank, take_lowest
from ovit_engine.pruning.block_inverse import BlockInverse
from ovit_engine.pruning.blocks import Segment, in_small_groups
from ovit_engine.pruning.eliminate import BEYOND_QUOTA, eliminate
from ovit_engine.pruning.fisher import joint_change, sound_inverse
from ovit_engine.pruning.memory import Memory
from ovit_engine.pruning.patterns import NM
from ovit_engine.pruning.problem import Advance, Options, Problem, Solver

# Blocks made into a mask at once.
_FEW = 4096


@dataclass(frozen=True)
class RemovalOrder:
    """How the blocks of a segment empty, [blocks, units], in main memory."""

    segment: Segment
    # Position in its block of the unit that goes at each step, int16.
    order: Tensor
    # What the step costs, or what `eliminate` records in its place.
    cost: Tensor
    # Whether the precision of the options was enough, [blocks].
    is_sound: Tensor


class Ovit(Solver[list[RemovalOrder]]):
    """Observe all gradients, eliminate, move."""

    updates = ("joint", "none")
    stage = "eliminate"

    def __init__(self, problem: Problem, count: int) -> None:
        super().__init__(problem, count)
        self._fisher = BlockInverse(problem, count)

    @classmethod
    def memory(cls, shapes: Sequence[torch.Size], options: Options, count: int) -> Memory:
        return BlockInverse.memory(shapes, options, count)

    @classmethod
    def choose(cls, problem: Problem, candidates: Sequence[list[RemovalOrder]]) -> tuple[list[Tensor], list[float]]:
        """As many of the first steps of each block as its share allows; the predicted increase of the loss."""
        pattern = problem.options.pattern
        masks, errors = [], []
        removals = _allocate(problem, candidates)
        for index, (weight, courses) in enumerate(zip(problem.weights, candidates, strict=True)):
            kept = pattern.to_layout(problem.masks[index]).clone()
            error = 0.0
            for course, removal in zip(courses, removals[index], strict=True):
                part = course.segment.cut(kept)
                for start in range(0, len(removal), _FEW):
                    here = slice(start, start + _FEW)
                    part[here] &= ~_removed(course.order[here], removal[here], pattern.unit).to(part.device)
                error += float(course.cost.masked_fill(~removal, 0).sum(dtype=torch.float64))
            masks.append(pattern.from_layout(kept, weight.shape))
            errors.append(error)
        return masks, errors

    def observe(self, chunk: Sequence[Tensor]) -> None:
        self._fisher.observe(chunk)

    def candidates(self, advance: Advance) -> list[list[RemovalOrder]]:
        """Return the removal order of every segment, by tensor."""
        self._fisher.finish()
        courses: list[list[RemovalOrder]] = [[] for _ in self._problem.weights]
        for number, segment in enumerate(self._fisher.segments):
            courses[segment.tensor].append(self._course(number, segment, advance))
        return courses

    def move(self, masks: Sequence[Tensor], candidates: Sequence[list[RemovalOrder]], advance: Advance) -> list[Tensor]:
        """Return new weights, the survivors at the best place."""
        self._fisher.finish()
        is_sound = [course.is_sound for courses in candidates for course in courses]

        def change(number: int, here: slice, removed: Tensor) -> Tensor:
            return self._change(number, here, removed, is_sound[number][here].to(removed.device))

        return self._fisher.move(masks, change, advance)

    def _course(self, number: int, segment: Segment, advance: Advance) -> RemovalOrder:
        shape = (segment.count, segment.size // self._problem.options.pattern.unit)
        order = torch.zeros(shape, dtype=torch.int16, device="cpu")
        cost = torch.full(shape, BEYOND_QUOTA, dtype=self._problem.options.dtype, device="cpu")
        course = RemovalOrder(segment, order, cost, torch.ones(segment.count, dtype=torch.bool, device="cpu"))
        inverse = self._fisher.inverse[number]
        for here in self._fisher.chunks(number):
            blocks = torch.arange(here.start, here.stop, device=inverse.device)
            first, price, sound = self._eliminate(number, blocks, inverse[here])
            rows = blocks.cpu().unsqueeze(1), torch.arange(first.shape[1], device="cpu").unsqueeze(0)
            order[rows], cost[rows] = first.to("cpu", torch.int16), price.cpu()
            for few in in_small_groups(blocks[~sound]):
                self._eliminate_in_float64(number, few, course)
            advance(len(blocks) * segment.size)
        return course

    def _eliminate_in_float64(self, number: int, blocks: Tensor, course: RemovalOrder) -> None:
        """Blocks whose condition is beyond float32, in float64 and with H made positive definite."""
        course.is_sound[blocks.cpu()] = False
        inverse = sound_inverse(self._fisher.inverse[number][blocks], self._fisher.lowest(number)[blocks])
        first, price, _ = self._eliminate(number, blocks, inverse)
        if not bool(price.isfinite().all()):
            name = self._problem.names[course.segment.tensor]
            raise FloatingPointError(f"{name}: elimination does not stay finite in float64")
        cost, order = course.cost, course.order
        cost[blocks.cpu()] = BEYOND_QUOTA
        rows = blocks.cpu().unsqueeze(1), torch.arange(first.shape[1], device="cpu").unsqueeze(0)
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

    def _change(self, number: int, here: slice, removed: Tensor, sound: Tensor) -> Tensor:
        if bool(sound.all()):
            return self._fisher.joint_change(number, here, removed)
        weights = self._fisher.weights(number)[here].to(self._problem.options.dtype)
        inverse, lowest = self._fisher.inverse[number][here], self._fisher.lowest(number)[here]
        change = torch.empty_like(weights)
        change[sound] = joint_change(inverse[sound], weights[sound], removed[sound], lowest[sound])
        for few in in_small_groups((~sound).nonzero().squeeze(1)):
            exact = sound_inverse(inverse[few], lowest[few])
            change[few] = joint_change(exact, weights[few].double(), removed[few], lowest[few]).to(change)
        return change


def _allocate(problem: Problem, candidates: Sequence[list[RemovalOrder]]) -> list[list[Tensor]]:
    """Return which steps [blocks, units] of each removal order are taken, by tensor."""
    if isinstance(problem.options.pattern, NM):
        return [[course.cost >= 0 for course in courses] for courses in candidates]
    removals: list[list[Tensor]] = [[] for _ in candidates]
    for scope, count in problem.quotas:
        members = [(index, course) for index in scope for course in candidates[index]]
        largest = max(course.segment.size for _, course in members)
        rankings = [rank(course.cost, problem.options.rule, largest / course.segment.size) for _, course in members]
        taken = take_lowest(rankings, count)
        for (index, _), each in zip(members, taken, strict=True):
            removals[index].append(each)
    return removals


def _removed(order: Tensor, removal: Tensor, unit: int) -> Tensor:
    """Return the weights [blocks, units * unit] that go, from the steps that are taken."""
    removed = torch.zeros_like(removal)
    block, step = removal.nonzero(as_tuple=True)
    removed[block, order[block, step].long()] = True
    return removed.repeat_interleave(unit, dim=1)
