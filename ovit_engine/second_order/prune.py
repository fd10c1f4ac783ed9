"""The two ways in: `prune_tensors` for everything at hand, `prune_streamed` for gradients that come in chunks."""

from collections.abc import Iterable, Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from ovit_engine.pattern import Pattern, parse_pattern
from ovit_engine.second_order.magnitude import Magnitude
from ovit_engine.second_order.memory import estimate_memory, preflight
from ovit_engine.second_order.options import Options, Rule, Scope, Update
from ovit_engine.second_order.ovit import Ovit
from ovit_engine.second_order.precision import exact_arithmetic
from ovit_engine.second_order.problem import Problem, Pruned, Solver, make_problem

METHODS: dict[str, type[Solver]] = {"ovit": Ovit, "magnitude": Magnitude}

PatternLike = Pattern | str | dict[str, list[int]]


class PruneOptions(TypedDict, total=False):
    """Keywords of `prune_streamed`, meaning and defaults as in `prune_tensors`."""

    sparsity: float | None
    scope: Scope
    pattern: PatternLike
    block: int
    damp: float
    rule: Rule
    update: Update
    dtype: torch.dtype


def prune_tensors(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    *,
    method: str = "ovit",
    sparsity: float | None = None,
    scope: Scope = "global",
    pattern: PatternLike = "unstructured",
    masks: Sequence[Tensor] | None = None,
    block: int = 48,
    damp: float = 1e-6,
    rule: Rule = "cumulative",
    update: Update = "joint",
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], list[Tensor]]:
    """Prune weights to a sparsity at the least predicted cost; returns (masks, weights), nothing is changed in place.

    Counts are exact: unstructured round(sparsity * weights), global or in each tensor; whole blocks; N:M as the
    pattern says. A target that is already reached changes nothing.

    Args:
        weights: tensors of any shape, device and floating type; what is computed is computed where they are.
        gradients: one [N, *shape] a weight, of the mean loss of N batches; None will do for magnitude.
        method: ovit, or magnitude (which reads none of block, damp, rule, update and dtype).
        sparsity: share of zeros afterwards; may be left out only where the pattern implies it.
        scope: "global" or "layer".
        pattern: "unstructured", "2:4" (keep:group), {"block": [rows, cols]} or a `Pattern`.
        masks: what was pruned before (True = kept); it stays pruned and counts.
        block: largest Fisher block. Memory is numel * block numbers.
        damp: lambda of the Fisher matrix. Its meaning depends on the images in a gradient.
        rule: how removals are ranked across blocks, "cumulative" or "marginal" (see `allocate`).
        update: "joint" moves the survivors, "none" leaves them.
        dtype: float32 or float64, of the solver's state.

    Raises:
        ValueError: options, shapes, or a non-finite weight or gradient, with the name of the tensor.
        MemoryError: the solver would not fit, said before it starts.
    """
    if gradients is None and _method(method).needs_gradients:
        raise ValueError(f"{method} needs gradients")
    count = 0 if not gradients else len(gradients[0])
    pruned = prune_streamed(
        weights,
        () if gradients is None else (gradients,),
        count,
        method=method,
        masks=masks,
        sparsity=sparsity,
        scope=scope,
        pattern=pattern,
        block=block,
        damp=damp,
        rule=rule,
        update=update,
        dtype=dtype,
    )
    return pruned.masks, pruned.weights


def prune_streamed(
    weights: Sequence[Tensor],
    chunks: Iterable[Sequence[Tensor]],
    count: int,
    *,
    names: Sequence[str] | None = None,
    masks: Sequence[Tensor] | None = None,
    method: str = "ovit",
    **options: Unpack[PruneOptions],
) -> Pruned:
    """Prune with gradients that arrive in chunks, `count` in all; options as in `prune_tensors`.

    A chunk is one tensor [k, *shape] a weight, k as it comes (16 or more is fastest); it is not kept, so its memory
    may be used again. Chunks are not asked for where the target is already reached. `names` are for error messages.

    Raises:
        ValueError: as `prune_tensors`, or gradients that are not `count`.
        MemoryError: the solver would not fit, said before the first chunk is asked for.
    """
    solver_type = _method(method)
    problem = make_problem(weights, masks, names, _options(options))
    if problem.is_solved():
        unchanged = [weight.clone() for weight in problem.weights]
        return Pruned([mask.clone() for mask in problem.masks], unchanged, [0.0] * len(unchanged))
    if not solver_type.needs_gradients:
        with exact_arithmetic():
            return solver_type(problem, count).solve()
    preflight(_needs(problem))
    with exact_arithmetic():
        solver = solver_type(problem, count)
    seen = 0
    for chunk in chunks:  # outside of exact_arithmetic: whoever makes gradients needs autograd
        with exact_arithmetic():
            _check_chunk(problem, chunk, seen)
            seen += len(chunk[0])
            if seen <= count:
                solver.observe(chunk)
    if seen != count:
        raise ValueError(f"{count} gradients were announced, {seen} came")
    with exact_arithmetic():
        return solver.solve()


def _method(name: str) -> type[Solver]:
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, is {name!r}")
    return METHODS[name]


def _options(given: PruneOptions) -> Options:
    """Check what was given and read the pattern."""
    pattern = parse_pattern(given.get("pattern", "unstructured"))
    rest = {key: value for key, value in given.items() if key != "pattern"}
    return Options(pattern=pattern, **rest)  # type: ignore[arg-type]


def _needs(problem: Problem) -> dict[torch.device, int]:
    """Bytes by device."""
    options = problem.options
    by_device: dict[torch.device, list[torch.Size]] = {}
    for weight in problem.weights:
        by_device.setdefault(weight.device, []).append(weight.shape)
    return {
        device: estimate_memory(shapes, block=options.block, pattern=options.pattern, dtype=options.dtype)
        for device, shapes in by_device.items()
    }


def _check_chunk(problem: Problem, chunk: Sequence[Tensor], seen: int) -> None:
    """Raise ValueError if gradients do not fit the weights or are not finite; `seen` came before."""
    if len(chunk) != len(problem.weights):
        raise ValueError(f"{len(problem.weights)} weights but {len(chunk)} gradients")
    for name, weight, gradient in zip(problem.names, problem.weights, chunk, strict=True):
        expected = (len(chunk[0]), *weight.shape)
        if gradient.shape != expected:
            raise ValueError(f"{name}: gradients must have shape {expected}, have {tuple(gradient.shape)}")
        if bool(gradient.sum().isfinite()):  # a sum costs no memory; it may overflow where no entry did
            continue
        broken = (~gradient.isfinite()).flatten(1).any(1).nonzero()
        if len(broken):
            raise ValueError(f"{name}: non-finite values in gradient {seen + int(broken[0])}")
