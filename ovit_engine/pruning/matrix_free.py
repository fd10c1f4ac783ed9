"""The inverse Fisher matrix of large blocks, never formed: M-FAC (arXiv 2107.03356) asks all of the gradients.

With G [N, B] the gradients of a block, A = N damp I + G G^T and L its Cholesky factor,

    H = (I - G^T A^-1 G) / damp = (I - Y^T Y) / damp,   Y = L^-1 G

so the diagonal of H and its products with vectors take N * B numbers, where H itself has B * B: worth it where N < B.
The recursion of the paper (H_i g_i for each gradient) gives the same numbers one vector at a time. The group update
needs no more: among survivors R it is the ridge regression of what is lost on what is left,

    w_R <- w_R + G_R^T (N damp I + G_R G_R^T)^-1 G_Q w_Q

Small matrices and their factors are in float64, since I - Y^T Y cancels. Blocks lie within tensors (the published
code lets them run over the borders of layers, which move with every step).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ovit_engine.pruning.blocks import Blocks, segments
from ovit_engine.pruning.memory import Memory
from ovit_engine.pruning.problem import Options, Problem

# Float64 numbers in the temporaries of one chunk, at least for one block.
_NUMBERS_CPU, _NUMBERS_GPU = 2**21, 2**27


class MatrixFree(Blocks):
    """Observe all gradients: they are kept, numel * N numbers."""

    def __init__(self, problem: Problem, count: int) -> None:
        super().__init__(problem)
        self._count = count
        self._seen = 0
        dtype = problem.options.dtype
        self._gradients = [
            torch.zeros(self._count, weight.numel(), dtype=dtype, device=weight.device) for weight in problem.weights
        ]

    @staticmethod
    def memory(shapes: Sequence[torch.Size], options: Options, count: int) -> Memory:
        """Held: all gradients. Besides: the bookkeeping, and the temporaries of one chunk of blocks."""
        item, numels = options.dtype.itemsize, [shape.numel() for shape in shapes]
        block = max((cut.size for cut in segments(shapes, options.pattern, options.block)), default=0)
        chunk = max(_NUMBERS_CPU, _numbers(count, block)) * 8
        return Memory([numel * count * item for numel in numels], sum(numels) * 3 * item + chunk)

    def chunks(self, number: int) -> Iterator[slice]:
        segment = self.segments[number]
        on_cpu = self.problem.weights[segment.tensor].device.type == "cpu"
        step = max(1, (_NUMBERS_CPU if on_cpu else _NUMBERS_GPU) // _numbers(self._count, segment.size))
        return (slice(start, min(start + step, segment.count)) for start in range(0, segment.count, step))

    def observe(self, chunk: Sequence[Tensor]) -> None:
        """Keep gradients [k, *shape]."""
        stop = self._seen + len(chunk[0])
        for buffer, kept, gradients in zip(self._gradients, self.kept, chunk, strict=True):
            buffer[self._seen : stop] = self.problem.options.pattern.to_layout(gradients, leading=1)
            buffer[self._seen : stop] *= kept
        self._seen = stop

    def tiles(self, number: int, here: slice) -> tuple[Tensor, Tensor]:
        """H_GG of every unit G of some blocks [c, units, unit, unit], and the floor of their diagonal [c, B]."""
        damp, unit = self.problem.options.damp, self.problem.options.pattern.unit
        rows = self._rows(number, here)
        fisher_diagonal = damp + rows.square().sum(1) / self._count
        whitened = self._whiten(rows)
        parts = whitened.reshape(*rows.shape[:2], -1, unit).permute(0, 2, 3, 1)
        identity = torch.eye(unit, dtype=torch.float64, device=rows.device)
        return (identity - parts @ parts.mT) / damp, 0.5 / fisher_diagonal

    def multiply(self, number: int, here: slice, vectors: Tensor) -> Tensor:
        """H x for vectors x [c, B], one a block."""
        whitened = self._whiten(self._rows(number, here))
        column = vectors.double().unsqueeze(2)
        product = column - whitened.mT @ (whitened @ column)
        return product.squeeze(2) / self.problem.options.damp

    def joint_change(self, number: int, here: slice, removed: Tensor) -> Tensor:
        """Return what to add to the weights when all of `removed` [c, B] go at once (they themselves become zero)."""
        weights = self.weights(number)[here].double()
        rows = self._rows(number, here)
        lost = rows @ (weights * removed).unsqueeze(2)
        left = rows.masked_fill_(removed.unsqueeze(1), 0)
        change = left.mT @ torch.cholesky_solve(lost, self._factor(left))
        return torch.where(removed, -weights, change.squeeze(2))

    def release(self, number: int) -> None:
        if number + 1 == len(self.segments) or self.segments[number + 1].tensor != self.segments[number].tensor:
            self._gradients[self.segments[number].tensor] = torch.empty(0)

    def _rows(self, number: int, here: slice) -> Tensor:
        """Return the gradients of some blocks, [c, N, B] in float64: a copy."""
        segment = self.segments[number]
        part = segment.cut(self._gradients[segment.tensor])[:, here].transpose(0, 1)
        return part.to(torch.float64, copy=True)

    def _whiten(self, rows: Tensor) -> Tensor:
        """Y [c, N, B]."""
        whitened: Tensor = torch.linalg.solve_triangular(self._factor(rows), rows, upper=False)
        return whitened

    def _factor(self, rows: Tensor) -> Tensor:
        """L [c, N, N]; where damping drowns in the rounding of the gradients, it is raised to that rounding."""
        gram = rows @ rows.mT
        rounding = gram.diagonal(dim1=1, dim2=2).sum(1) * torch.finfo(torch.float64).eps
        ridge = rows.new_full((len(rows),), self._count * self.problem.options.damp)
        lower: Tensor
        while bool(gram.isfinite().all()):
            gram.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
            lower, info = torch.linalg.cholesky_ex(gram)
            if not bool(info.any()):
                return lower
            ridge = torch.where(info > 0, 10 * torch.maximum(rounding, ridge), 0)
        raise FloatingPointError("products of gradients are beyond the range of float64")


def _numbers(count: int, block: int) -> int:
    """Float64 numbers that one block takes: gradients, Y, the small matrix and its factor."""
    return max(1, 2 * count * (count + block))
