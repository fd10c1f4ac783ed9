"""The two ways in: `prune_tensors` for everything at hand, `prune_streamed` for gradients that come in chunks."""

from collections.abc import Iterable, Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from ovit_engine.pattern import NM, Pattern, parse_pattern
from ovit_engine.second_order.choose import prune_lowest
from ovit_engine.second_order.diagonal import GradWeight, Obd
from ovit_engine.second_order.magnitude import Magnitude
from ovit_engine.second_order.memory import preflight
from ovit_engine.second_order.obert import Mfac, Obert
from ovit_engine.second_order.options import Options, Rule, Scope, Update, one_of
from ovit_engine.second_order.ovit import Ovit
from ovit_engine.second_order.precision import exact_arithmetic
from ovit_engine.second_order.problem import Problem, Pruned, Solver, check_gradients, make_problem

METHODS: dict[str, type[Solver]] = {
    "ovit": Ovit,
    "obert": Obert,
    "obd": Obd,
    "mfac": Mfac,
    "grad_weight": GradWeight,
    "magnitude": Magnitude,
}

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

    Counts are exact: unstructured round(sparsity * weights), in all or in each tensor; whole blocks; N:M as the
    pattern says. A target that is already reached changes nothing.

    Args:
        weights: tensors of any shape, device and floating type; what is computed is computed where they are.
        gradients: one [N, *shape] a weight, of the mean loss of N batches; None will do for magnitude.
        method: ovit; obert (scores each weight alone), mfac (obert without forming the inverse, for large blocks);
            obd (diagonal, reads damp), grad_weight and magnitude (neither moves survivors nor reads the options below).
        sparsity: share of zeros afterwards; may be left out only where the pattern implies it.
        scope: "global" (over all tensors), "layer" (alike in each) or "erk" (small tensors stay denser).
        pattern: "unstructured", "2:4" (keep:group), {"block": [rows, cols]} or a `Pattern`.
        masks: what was pruned before (True = kept); it stays pruned and counts.
        block: largest Fisher block. Memory is numel * block numbers; for mfac numel * N instead.
        damp: lambda of the Fisher matrix. Its meaning depends on the images in a gradient.
        rule: how oViT ranks removals across blocks, "cumulative" or "marginal" (see `allocate`).
        update: "joint" moves the survivors, "none" leaves them; "independent" (obert, mfac) moves them as published.
        dtype: float32 or float64, of the solver's state.

    Raises:
        ValueError: options, shapes, or a non-finite weight or gradient, with the name of the tensor.
        TypeError: options that are no numbers, weights, gradients or masks that are no list of tensors.
        MemoryError: the solver would not fit, said before it starts.
    """
    if gradients is None and _method(method).needs_gradients:
        raise ValueError(f"{method} needs gradients")
    if gradients is not None:
        check_gradients(gradients)
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
    one_of("update", problem.options.update, solver_type.updates)
    if problem.is_solved():
        unchanged = [weight.clone() for weight in problem.weights]
        return Pruned([mask.clone() for mask in problem.masks], unchanged, [0.0] * len(unchanged))
    if not solver_type.needs_gradients:
        with exact_arithmetic():
            return solver_type(problem, count).solve()
    if count < 1:
        raise ValueError(f"{method} needs gradients, and there are none")
    preflight(_needs(problem, solver_type, count), solver_type.advice)
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


def prune_by_scores(
    weights: Sequence[Tensor],
    scores: Sequence[Tensor],
    *,
    masks: Sequence[Tensor] | None = None,
    names: Sequence[str] | None = None,
    sparsity: float | None = None,
    scope: Scope = "global",
    pattern: PatternLike = "unstructured",
) -> Pruned:
    """Prune what has the lowest scores (shaped as the weights, summed over a tile); the rest stays where it is.

    For scores that are not one of the `METHODS`. Counts, masks and errors are those of `prune_tensors`.
    """
    options = Options(pattern=parse_pattern(pattern), sparsity=sparsity, scope=scope)
    problem = make_problem(weights, masks, names, options)
    if len(scores) != len(weights):
        raise ValueError(f"{len(weights)} weights but {len(scores)} scores")
    for name, weight, score in zip(problem.names, problem.weights, scores, strict=True):
        if score.shape != weight.shape or not score.is_floating_point():
            raise ValueError(
                f"{name}: scores must be floating point of shape {tuple(weight.shape)}, "
                f"are {score.dtype} of {tuple(score.shape)}"
            )
    with exact_arithmetic():
        return prune_lowest(problem, scores)


def estimate_memory(
    shapes: Sequence[Sequence[int]],
    *,
    method: str = "ovit",
    block: int = 48,
    pattern: PatternLike = "unstructured",
    dtype: torch.dtype = torch.float32,
    gradients: int = 4096,
) -> int:
    """Bytes that a method needs at its peak beside weights of these shapes and one chunk of gradients.

    For oViT and oBERT most of it is the inverse Fisher, numel * block numbers; for M-FAC all gradients,
    numel * gradients numbers; the others need a few numbers a weight. Raises ValueError for an unknown method.
    """
    parsed = parse_pattern(pattern)
    sparsity = None if isinstance(parsed, NM) else 0.5
    options = Options(pattern=parsed, sparsity=sparsity, block=block, dtype=dtype)
    return _method(method).memory([torch.Size(shape) for shape in shapes], options, gradients)


def _method(name: str) -> type[Solver]:
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, is {name!r}")
    return METHODS[name]


def _options(given: PruneOptions) -> Options:
    """Check what was given and read the pattern."""
    pattern = parse_pattern(given.get("pattern", "unstructured"))
    rest = {key: value for key, value in given.items() if key != "pattern"}
    return Options(pattern=pattern, **rest)  # type: ignore[arg-type]


def _needs(problem: Problem, solver_type: type[Solver], count: int) -> dict[torch.device, int]:
    """Bytes by device."""
    by_device: dict[torch.device, list[torch.Size]] = {}
    for weight in problem.weights:
        by_device.setdefault(weight.device, []).append(weight.shape)
    return {device: solver_type.memory(shapes, problem.options, count) for device, shapes in by_device.items()}


def _check_chunk(problem: Problem, chunk: Sequence[Tensor], seen: int) -> None:
    """Raise ValueError if gradients do not fit the weights or are not finite; `seen` came before."""
    check_gradients(chunk)
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
