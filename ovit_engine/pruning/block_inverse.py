"""The inverse Fisher matrix of every block, gathered from gradients: numel * block numbers, the one large array."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ovit_engine.pruning.blocks import Blocks, blocks_a_chunk, matrix_entries, segments
from ovit_engine.pruning.eliminate import diagonal_tiles
from ovit_engine.pruning.fisher import RANK, absorb, initial_inverse, joint_change
from ovit_engine.pruning.memory import Memory
from ovit_engine.pruning.patterns import Pattern
from ovit_engine.pruning.problem import Options, Problem

# Gradients brought into the pattern's layout at once.
_STACK = 4 * RANK


class BlockInverse(Blocks):
    """Observe all gradients, `finish`, and H is there; everything is done in chunks of blocks."""

    def __init__(self, problem: Problem, count: int) -> None:
        super().__init__(problem)
        self._count = count
        self.inverse: list[Tensor] = []
        self._squares: list[Tensor] = []
        options = problem.options
        for segment in self.segments:
            device = problem.weights[segment.tensor].device
            shape = (segment.count, segment.size)
            self.inverse.append(initial_inverse(*shape, options.damp, dtype=options.dtype, device=device))
            self._squares.append(torch.zeros(shape, dtype=options.dtype, device=device))
        self._waiting: list[Tensor] = []
        self._waiting_count = 0

    @staticmethod
    def memory(shapes: Sequence[torch.Size], options: Options, count: int) -> Memory:
        """Held: H, lower bounds, waiting gradients. Besides: order, costs, ranking, temporaries of one chunk."""
        item = options.dtype.itemsize
        cuts = segments(shapes, options.pattern, options.block)
        entries = matrix_entries(shapes, options.pattern, options.block)
        chunk = max((blocks_a_chunk(entries, cut, on_cpu=False) * cut.size**2 for cut in cuts), default=0) * item
        numels = [shape.numel() for shape in shapes]
        held = [(1 + RANK) * item * numel for numel in numels]
        for cut in cuts:
            held[cut.tensor] += cut.count * cut.size**2 * item
        return Memory(held, sum(numels) * (2 + 2 * item) + 3 * chunk)

    def observe(self, chunk: Sequence[Tensor]) -> None:
        """Take gradients [k, *shape]; fewer than `RANK` wait in a buffer for others."""
        start, total = 0, len(chunk[0])
        while start < total:
            if self._waiting_count == 0 and total - start >= RANK:
                for index, gradients in enumerate(chunk):
                    for part in torch.split(gradients[start:], _STACK):
                        self._absorb(index, self._pattern.to_layout(part, leading=1))
                return
            stop = min(total, start + RANK - self._waiting_count)
            self._wait([gradients[start:stop] for gradients in chunk])
            start = stop

    def finish(self) -> None:
        """Take what still waits."""
        self._absorb_waiting()
        self._waiting.clear()

    def fisher_diagonal(self, number: int) -> Tensor:
        """F_jj of a segment, [blocks, B]."""
        return self._squares[number] / self._count + self.problem.options.damp

    def floor(self, number: int) -> Tensor:
        """1 / F_jj bounds the diagonal of H from below; half of it, so that rounding never decides. [blocks, B]."""
        return (0.5 / self.fisher_diagonal(number)).clamp_(min=torch.finfo(self.problem.options.dtype).tiny)

    def lowest(self, number: int) -> Tensor:
        """Return what no eigenvalue of H can be below: one over the trace of F, [blocks]."""
        return 1 / self.fisher_diagonal(number).sum(1)

    def tiles(self, number: int, here: slice) -> tuple[Tensor, Tensor]:
        """H_GG of every unit G of some blocks [c, units, unit, unit], and the floor of their diagonal [c, B]."""
        return diagonal_tiles(self.inverse[number][here], self._pattern.unit), self.floor(number)[here]

    def multiply(self, number: int, here: slice, vectors: Tensor) -> Tensor:
        """H x for vectors x [c, B], one a block."""
        return torch.bmm(self.inverse[number][here], vectors.unsqueeze(2)).squeeze(2)

    def joint_change(self, number: int, here: slice, removed: Tensor) -> Tensor:
        """Return what to add to the weights when all of `removed` [c, B] go at once."""
        weights = self.weights(number)[here].to(self.problem.options.dtype)
        return joint_change(self.inverse[number][here], weights, removed, self.lowest(number)[here])

    def release(self, number: int) -> None:
        self.inverse[number] = torch.empty(0)

    @property
    def _pattern(self) -> Pattern:
        return self.problem.options.pattern

    def _wait(self, gradients: list[Tensor]) -> None:
        if not self._waiting:
            dtype = self.problem.options.dtype
            self._waiting = [
                torch.empty(RANK, weight.numel(), dtype=dtype, device=weight.device) for weight in self.problem.weights
            ]
        stop = self._waiting_count + len(gradients[0])
        for buffer, each in zip(self._waiting, gradients, strict=True):
            buffer[self._waiting_count : stop] = self._pattern.to_layout(each, leading=1)
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
        for number, segment in enumerate(self.segments):
            if segment.tensor != index:
                continue
            parts = segment.cut(flat)
            kept = segment.cut(self.kept[index])
            for here in self.chunks(number):
                stack = parts[:, here].transpose(0, 1).to(self.inverse[number]).contiguous()
                if self.has_pruned[index]:
                    stack = stack * kept[here].unsqueeze(1)
                self._squares[number][here] += torch.linalg.vector_norm(stack, dim=1).square()
                for few in stack.tensor_split(steps, dim=1):
                    absorb(self.inverse[number][here], few, self._count)
