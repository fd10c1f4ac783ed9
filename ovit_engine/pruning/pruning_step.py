"""One pruning step, pass by pass over the gradients, as its plan says."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor

from ovit_engine.distributed.comm import Comm
from ovit_engine.pruning.allocation import masked
from ovit_engine.pruning.memory_plan import Plan
from ovit_engine.pruning.problem import Problem, Pruned, Solver, check_gradients
from ovit_engine.utils.precision import exact_arithmetic
from ovit_engine.utils.progress import Progress


class Stages:
    """Measure the seconds of each stage (on a GPU up to what was launched), and report progress over all passes.

    Gradients are counted one by one, the other stages in weights.
    """

    def __init__(self, totals: Mapping[str, int], progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._totals = totals
        self._done = dict.fromkeys(totals, 0)
        self._progress = progress

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time of the body for a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def advance(self, stage: str, amount: int) -> None:
        """Report that `amount` more of a stage is done."""
        self._done[stage] += amount
        if self._progress is not None:
            self._progress(stage, self._done[stage], self._totals[stage])


# Gradients of the tensors with these indices from the start, in chunks: one tensor [k, *shape] each.
GradientSource = Callable[[list[int]], Iterable[Sequence[Tensor]]]


class PruningStep:
    """Observe, choose, move; `run` does it once."""

    def __init__(
        self,
        problem: Problem,
        solver_type: type[Solver[Any]],
        source: GradientSource,
        count: int,
        plan: Plan,
        comm: Comm,
        progress: Progress | None,
    ) -> None:
        self._problem = problem
        self._solver_type = solver_type
        self._source = source
        self._count = count
        self._plan = plan
        self._comm = comm
        self._moves = solver_type.moves(problem.options)
        self._passes = 0
        mine = chain.from_iterable(held[comm.rank] for held in plan.rounds)
        weights = sum(problem.weights[index].numel() for index in mine)
        totals = {"gradients": plan.passes * count, solver_type.stage: weights, "move": weights}
        self._stages = Stages(totals, progress)

    def run(self) -> Pruned:
        """Masks, weights and errors of all tensors, the same on every rank."""
        masks, weights, errors = self._jointly() if self._plan.is_joint else self._by_round()
        return Pruned(masks, weights, errors, self._passes, dict(self._stages.seconds))

    def _by_round(self) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """Choose round by round, each for itself."""
        masks, weights = list(self._problem.masks), list(self._problem.weights)
        errors = [0.0] * len(masks)
        for held in self._plan.rounds:
            solver = self._observe(held)
            mine = held[self._comm.rank]
            with self._comm.fail_together(), exact_arithmetic():
                if solver is not None:
                    part = self._problem.part(mine)
                    candidates = self._candidates(solver)
                    with self._stages.timed("allocate"):
                        chosen, costs = self._solver_type.choose(part, candidates)
                    moved = self._move(solver, part, chosen, candidates)
                    for index, mask, weight, error in zip(mine, chosen, moved, costs, strict=True):
                        masks[index], weights[index], errors[index] = mask, weight, error
            del solver  # before the next round
        for rank, index in self._owners():
            masks[index] = self._comm.broadcast(masks[index], rank)
            weights[index] = self._comm.broadcast(weights[index], rank)
        by_rank = self._comm.gather(errors)
        for rank, index in self._owners():
            errors[index] = by_rank[rank][index]
        return masks, weights, errors

    def _jointly(self) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """Choose over all tensors at once: rank 0 does so once all rounds have said what removals cost."""
        problem, me = self._problem, self._comm.rank
        candidates: dict[int, Any] = {}
        solver: Solver[Any] | None = None
        for held in self._plan.rounds:
            solver = None
            solver = self._observe(held)
            with self._comm.fail_together(), exact_arithmetic():
                if solver is not None:
                    candidates.update(zip(held[me], self._candidates(solver), strict=True))
        with self._stages.timed("allocate"):
            masks, errors = self._choose(candidates)
        if not self._moves:
            return masks, masked(problem.weights, masks), errors
        weights = masked(problem.weights, masks)
        last = self._plan.rounds[-1]
        for held in reversed(self._plan.rounds):
            if not any(bool((problem.masks[i] & ~masks[i]).any()) for i in chain.from_iterable(held)):
                solver = None
                continue  # nothing goes, so nothing moves
            if held is not last:
                solver = self._observe(held)
            mine = held[me]
            with self._comm.fail_together(), exact_arithmetic():
                if solver is not None:
                    parts = [masks[i] for i in mine], [candidates[i] for i in mine]
                    for index, weight in zip(mine, self._move(solver, problem.part(mine), *parts), strict=True):
                        weights[index] = weight
            solver = None  # before the next round
        for rank, index in self._owners():
            weights[index] = self._comm.broadcast(weights[index], rank)
        return masks, weights, errors

    def _choose(self, candidates: dict[int, Any]) -> tuple[list[Tensor], list[float]]:
        """Return masks and errors, chosen by rank 0 for all ranks."""
        every = self._comm.gather_entries(candidates)
        masks, errors = list(self._problem.masks), [0.0] * len(self._problem.masks)
        with self._comm.fail_together(), exact_arithmetic():
            if self._comm.rank == 0:
                ordered = [_beside(every[i], weight) for i, weight in enumerate(self._problem.weights)]
                masks, errors = self._solver_type.choose(self._problem, ordered)
        return [self._comm.broadcast(mask, 0) for mask in masks], self._comm.gather(errors)[0]

    def _observe(self, held: list[list[int]]) -> Solver[Any] | None:
        """Return a solver for the tensors that this rank holds, which has seen all gradients; None for no tensors."""
        mine, union = held[self._comm.rank], sorted(chain.from_iterable(held))
        with self._comm.fail_together(), exact_arithmetic(), self._stages.timed("fisher"):
            solver = self._solver_type(self._problem.part(mine), self._count) if mine else None
        if not self._solver_type.needs_gradients:
            return solver
        self._passes += 1
        self._stages.advance("gradients", 0)  # the first of them may take long
        chunks = iter(self._source(union))
        seen, is_over = 0, False
        while not is_over:
            with self._comm.fail_together(), self._stages.timed("gradients"):
                # outside of exact_arithmetic: whoever makes gradients needs autograd
                chunk = next(chunks, None)
                if chunk is not None:
                    _check_chunk(self._problem, union, chunk, seen, self._comm.rank)
            with self._stages.timed("exchange"):
                found = self._comm.gather(None if chunk is None else len(chunk[0]))
                sizes, is_over = [size or 0 for size in found], all(size is None for size in found)
                arrived = list(self._comm.exchange(chunk, sizes, held, self._problem.weights))
            seen += sum(sizes)
            with self._comm.fail_together(), self._stages.timed("fisher"), exact_arithmetic():
                for part in arrived:
                    if solver is not None and seen <= self._count:
                        solver.observe(part)
            if seen <= self._count and not is_over:
                self._stages.advance("gradients", sum(sizes))
        if seen != self._count:
            raise ValueError(f"{self._count} gradients were announced, {seen} came")
        return solver

    def _candidates(self, solver: Solver[Any]) -> list[Any]:
        stage = self._solver_type.stage
        with self._stages.timed(stage):
            return solver.candidates(lambda weights: self._stages.advance(stage, weights))

    def _move(
        self, solver: Solver[Any], part: Problem, masks: Sequence[Tensor], candidates: Sequence[Any]
    ) -> list[Tensor]:
        if not self._moves:
            return masked(part.weights, masks)
        with self._stages.timed("move"):
            return solver.move(masks, candidates, lambda weights: self._stages.advance("move", weights))

    def _owners(self) -> list[tuple[int, int]]:
        """Return (rank, tensor) in the same order everywhere."""
        return [(rank, i) for held in self._plan.rounds for rank, mine in enumerate(held) for i in mine]


def _beside(candidate: Any, weight: Tensor) -> Any:
    """Return a candidate that came from another rank, on the device of its weight."""
    return candidate.to(weight.device) if isinstance(candidate, Tensor) else candidate


def _check_chunk(problem: Problem, indices: Sequence[int], chunk: Sequence[Tensor], seen: int, rank: int) -> None:
    """Raise ValueError if gradients do not fit the weights or are not finite; `seen` came before."""
    check_gradients(chunk)
    if len(chunk) != len(indices):
        raise ValueError(f"{len(indices)} weights but {len(chunk)} gradients")
    for index, gradient in zip(indices, chunk, strict=True):
        name, expected = problem.names[index], (len(chunk[0]), *problem.weights[index].shape)
        if gradient.shape != expected:
            raise ValueError(f"{name}: gradients must have shape {expected}, have {tuple(gradient.shape)}")
        if bool(gradient.sum().isfinite()):  # a sum costs no memory; it may overflow where no entry did
            continue
        broken = (~gradient.isfinite()).flatten(1).any(1).nonzero()
        if len(broken):
            number = seen + rank * len(chunk[0]) + int(broken[0])  # ranks before this one hold as many
            raise ValueError(f"{name}: non-finite values in gradient {number}")
