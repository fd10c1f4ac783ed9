"""oViT (arXiv 2210.09223, also known as CAP): correlation-aware greedy pruning with an exact joint update.

One event: gather the block-diagonal inverse Fisher from gradients (`fisher`), order the weights of every block by
greedy elimination (`eliminate`), decide how many each block loses (`allocate`), move the survivors (`update`). The
inverse Fisher is the one large array, numel * block numbers; everything else is done in chunks of blocks.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ovit_engine.pattern import NM
from ovit_engine.second_order.allocate import rank, take_lowest
from ovit_engine.second_order.eliminate import BEYOND_QUOTA, eliminate
from ovit_engine.second_order.fisher import RANK, absorb, initial_inverse, sound_inverse
from ovit_engine.second_order.partition import Segment, blocks_a_chunk, segments
from ovit_engine.second_order.problem import Problem, Pruned
from ovit_engine.second_order.update import joint_change

# Gradients brought into the pattern's layout at once.
_STACK = 4 * RANK

# Blocks done in float64 at once.
_FEW = 4


class Ovit:
    """Observe all gradients, solve, done: `solve` frees the inverse Fisher."""

    needs_gradients: ClassVar[bool] = True

    def __init__(self, problem: Problem, count: int) -> None:
        self._problem = problem
        self._count = count
        options = problem.options
        self._segments = segments([weight.shape for weight in problem.weights], options.pattern, options.block)
        self._has_pruned = [not bool(mask.all()) for mask in problem.masks]
        self._kept = [options.pattern.to_layout(mask) for mask in problem.masks]
        self._inverse: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._is_sound: list[Tensor] = []
        for segment in self._segments:
            device = problem.weights[segment.tensor].device
            shape = (segment.count, segment.size)
            self._inverse.append(initial_inverse(*shape, options.damp, dtype=options.dtype, device=device))
            self._squares.append(torch.zeros(shape, dtype=options.dtype, device=device))
            self._is_sound.append(torch.ones(segment.count, dtype=torch.bool, device=device))
        self._waiting: list[Tensor] = []
        self._waiting_count = 0

    def observe(self, chunk: Sequence[Tensor]) -> None:
        """Take gradients [k, *shape]; fewer than `RANK` wait in a buffer for others."""
        start, total = 0, len(chunk[0])
        while start < total:
            if self._waiting_count == 0 and total - start >= RANK:
                for index, gradients in enumerate(chunk):
                    for part in torch.split(gradients[start:], _STACK):
                        self._absorb(index, self._problem.options.pattern.to_layout(part, leading=1))
                return
            stop = min(total, start + RANK - self._waiting_count)
            self._wait([gradients[start:stop] for gradients in chunk])
            start = stop

    def solve(self) -> Pruned:
        """Masks, weights and the predicted increase of the loss."""
        self._absorb_waiting()
        self._waiting.clear()
        orders, costs = self._eliminate_all()
        removals = self._allocate(costs)
        errors = [0.0] * len(self._problem.weights)
        for segment, cost, removal in zip(self._segments, costs, removals, strict=True):
            errors[segment.tensor] += float(cost.masked_fill(~removal, 0).sum(dtype=torch.float64))
        costs.clear()
        return self._update(orders, removals, errors)

    def _wait(self, gradients: list[Tensor]) -> None:
        if not self._waiting:
            dtype = self._problem.options.dtype
            self._waiting = [
                torch.empty(RANK, weight.numel(), dtype=dtype, device=weight.device) for weight in self._problem.weights
            ]
        stop = self._waiting_count + len(gradients[0])
        for buffer, each in zip(self._waiting, gradients, strict=True):
            buffer[self._waiting_count : stop] = self._problem.options.pattern.to_layout(each, leading=1)
        self._waiting_count = stop
        if stop == RANK:
            self._absorb_waiting()

    def _absorb_waiting(self) -> None:
        if self._waiting_count:
            for index, buffer in enumerate(self._waiting):
                self._absorb(index, buffer[: self._waiting_count])
        self._waiting_count = 0

    def _absorb(self, index: int, flat: Tensor) -> None:
        """Take gradients [k, numel] of one tensor in layout order, each chunk of blocks while it is in the cache."""
        steps = -(-len(flat) // RANK)
        for segment, inverse, squares in zip(self._segments, self._inverse, self._squares, strict=True):
            if segment.tensor != index:
                continue
            parts = segment.cut(flat)
            kept = segment.cut(self._kept[index])
            for here in self._chunks(segment):
                stack = parts[:, here].transpose(0, 1).to(inverse).contiguous()
                if self._has_pruned[index]:
                    stack = stack * kept[here].unsqueeze(1)
                squares[here] += torch.linalg.vector_norm(stack, dim=1).square()
                for few in stack.tensor_split(steps, dim=1):
                    absorb(inverse[here], few, self._count)

    def _chunks(self, segment: Segment) -> Iterator[slice]:
        on_cpu = self._problem.weights[segment.tensor].device.type == "cpu"
        step = blocks_a_chunk(self._segments, segment, on_cpu)
        return (slice(start, min(start + step, segment.count)) for start in range(0, segment.count, step))

    def _flat_weights(self, segment: Segment) -> Tensor:
        return segment.cut(self._problem.options.pattern.to_layout(self._problem.weights[segment.tensor]))

    def _eliminate_all(self) -> tuple[list[Tensor], list[Tensor]]:
        """Order (int16) and cost [blocks, units] of every segment, in main memory."""
        unit = self._problem.options.pattern.unit
        orders, costs = [], []
        for number, segment in enumerate(self._segments):
            shape = (segment.count, segment.size // unit)
            order = torch.zeros(shape, dtype=torch.int16, device="cpu")
            cost = torch.full(shape, BEYOND_QUOTA, dtype=self._problem.options.dtype, device="cpu")
            for here in self._chunks(segment):
                blocks = torch.arange(here.start, here.stop, device=self._inverse[number].device)
                first, price, sound = self._eliminate(number, blocks, self._inverse[number][here])
                rows = blocks.cpu().unsqueeze(1), torch.arange(first.shape[1]).unsqueeze(0)
                order[rows], cost[rows] = first.to("cpu", torch.int16), price.cpu()
                for few in _few(blocks[~sound]):
                    self._eliminate_again(number, few, order, cost)
            orders.append(order)
            costs.append(cost)
        return orders, costs

    def _eliminate_again(self, number: int, blocks: Tensor, order: Tensor, cost: Tensor) -> None:
        """Blocks whose condition is beyond float32, in float64 and with H made positive definite."""
        self._is_sound[number][blocks] = False
        inverse = sound_inverse(self._inverse[number][blocks], self._lowest(number)[blocks])
        first, price, _ = self._eliminate(number, blocks, inverse)
        if not bool(price.isfinite().all()):
            name = self._problem.names[self._segments[number].tensor]
            raise FloatingPointError(f"{name}: elimination does not stay finite in float64")
        cost[blocks.cpu()] = BEYOND_QUOTA
        rows = blocks.cpu().unsqueeze(1), torch.arange(first.shape[1]).unsqueeze(0)
        order[rows], cost[rows] = first.to("cpu", torch.int16), price.clamp(max=torch.finfo(cost.dtype).max).to(cost)

    def _eliminate(self, number: int, blocks: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Order, cost and soundness of some blocks of a segment, in the precision of their H."""
        segment, options = self._segments[number], self._problem.options
        index, unit = segment.tensor, options.pattern.unit
        alive = segment.cut(self._kept[index])[blocks].reshape(len(blocks), -1, unit).any(2)
        quota = None
        if isinstance(options.pattern, NM):
            groups = self._problem.group_quotas(index).repeat_interleave(options.pattern.group)
            quota = segment.cut(groups)[blocks, :: options.pattern.group]
        # 1 / F_jj bounds the diagonal of H from below at every step; half of it, so that rounding never decides.
        floor = 0.5 / self._fisher_diagonal(number)[blocks].to(inverse.dtype)
        weights = self._flat_weights(segment)[blocks].to(inverse.dtype)
        floor = floor.clamp(min=torch.finfo(inverse.dtype).tiny)
        return eliminate(inverse, weights, alive, floor, unit=unit, quota=quota)

    def _fisher_diagonal(self, number: int) -> Tensor:
        """F_jj of a segment, [blocks, B]."""
        return self._squares[number] / max(self._count, 1) + self._problem.options.damp

    def _lowest(self, number: int) -> Tensor:
        """What no eigenvalue of H can be below: one over the trace of F, [blocks]."""
        return 1 / self._fisher_diagonal(number).sum(1)

    def _allocate(self, costs: list[Tensor]) -> list[Tensor]:
        """Which steps [blocks, units] of each segment's order are taken."""
        options = self._problem.options
        if isinstance(options.pattern, NM):
            return [cost >= 0 for cost in costs]
        removals: list[Tensor] = []
        for scope, count in self._problem.quotas():
            members = [cost for segment, cost in zip(self._segments, costs, strict=True) if segment.tensor in scope]
            removals += take_lowest([rank(cost, options.rule) for cost in members], count)
        return removals

    def _update(self, orders: list[Tensor], removals: list[Tensor], errors: list[float]) -> Pruned:
        problem, pattern = self._problem, self._problem.options.pattern
        kept = [flat.clone() for flat in self._kept]
        weights = [
            pattern.to_layout(weight).to(torch.promote_types(weight.dtype, problem.options.dtype), copy=True)
            for weight in problem.weights
        ]
        for number, (segment, order, removal) in enumerate(zip(self._segments, orders, removals, strict=True)):
            for here in self._chunks(segment):
                if removal[here].any():
                    removed = _removed(order[here], removal[here], pattern.unit).to(kept[segment.tensor].device)
                    part = segment.cut(weights[segment.tensor])[here]
                    part += self._change(number, here, removed)
                    segment.cut(kept[segment.tensor])[here] &= ~removed
            self._inverse[number] = torch.empty(0)
        masks, outputs = [], []
        for weight, flat, mask in zip(problem.weights, weights, kept, strict=True):
            masks.append(pattern.from_layout(mask, weight.shape))
            outputs.append(pattern.from_layout(torch.where(mask, flat, 0).to(weight.dtype), weight.shape))
        return Pruned(masks, outputs, errors)

    def _change(self, number: int, here: slice, removed: Tensor) -> Tensor:
        if self._problem.options.update == "none":
            return torch.zeros_like(removed, dtype=self._problem.options.dtype)
        weights = self._flat_weights(self._segments[number])[here].to(self._problem.options.dtype)
        inverse, lowest, sound = self._inverse[number][here], self._lowest(number)[here], self._is_sound[number][here]
        if bool(sound.all()):
            return joint_change(inverse, weights, removed, lowest)
        change = torch.empty_like(weights)
        change[sound] = joint_change(inverse[sound], weights[sound], removed[sound], lowest[sound])
        for few in _few((~sound).nonzero().squeeze(1)):
            exact = sound_inverse(inverse[few], lowest[few])
            change[few] = joint_change(exact, weights[few].double(), removed[few], lowest[few]).to(change)
        return change


def _few(blocks: Tensor) -> Iterator[Tensor]:
    """Indices of blocks, a few at a time; nothing for none."""
    return (blocks[start : start + _FEW] for start in range(0, len(blocks), _FEW))


def _removed(order: Tensor, removal: Tensor, unit: int) -> Tensor:
    """Weights [blocks, units * unit] that go, from the steps that are taken."""
    removed = torch.zeros_like(removal)
    block, step = removal.nonzero(as_tuple=True)
    removed[block, order[block, step].long()] = True
    return removed.repeat_interleave(unit, dim=1)
