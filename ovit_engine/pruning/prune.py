"""The two ways in: `prune_tensors` for everything at hand, `prune_streamed` for gradients that come in chunks."""

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from ovit_engine.distributed.comm import SINGLE_PROCESS, Comm
from ovit_engine.pruning.allocation import masked, remove_lowest_scores
from ovit_engine.pruning.memory import GIB
from ovit_engine.pruning.memory_plan import Plan, make_plan
from ovit_engine.pruning.obert import Mfac, Obert
from ovit_engine.pruning.ovit import Ovit
from ovit_engine.pruning.patterns import NM, Pattern, parse_pattern
from ovit_engine.pruning.problem import (
    Options,
    Problem,
    Pruned,
    Rule,
    Scope,
    Solver,
    Update,
    check_gradients,
    make_problem,
    one_of,
)
from ovit_engine.pruning.pruning_step import GradientSource, PruningStep
from ovit_engine.pruning.scores import GradWeight, Magnitude, Obd
from ovit_engine.utils.precision import exact_arithmetic
from ovit_engine.utils.progress import Progress

METHODS: dict[str, type[Solver[Any]]] = {
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
    memory_limit: int | None = None,
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
        memory_limit: bytes that the solver may take on each device; what is available if left out. Where not all
            tensors fit, they are worked on in groups, one after the other; the result is the same.

    Raises:
        ValueError: options, shapes, or a non-finite weight or gradient, with the name of the tensor.
        TypeError: options that are no numbers, weights, gradients or masks that are no list of tensors.
        MemoryError: a single tensor would not fit, said before anything starts.
    """
    if gradients is None and _method(method).needs_gradients:
        raise ValueError(f"{method} needs gradients")
    if gradients is not None:
        check_gradients(gradients)
    count = 0 if not gradients else len(gradients[0])
    pruned = prune_streamed(
        weights,
        lambda indices: () if gradients is None else (_pick(gradients, indices, len(weights)),),
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
        memory_limit=memory_limit,
    )
    return pruned.masks, pruned.weights


def prune_streamed(
    weights: Sequence[Tensor],
    chunks: Iterable[Sequence[Tensor]] | GradientSource,
    count: int,
    *,
    names: Sequence[str] | None = None,
    masks: Sequence[Tensor] | None = None,
    method: str = "ovit",
    memory_limit: int | None = None,
    comm: Comm = SINGLE_PROCESS,
    progress: Progress | None = None,
    **options: Unpack[PruneOptions],
) -> Pruned:
    """Prune with gradients that arrive in chunks, `count` in all; options as in `prune_tensors`.

    A chunk is one tensor [k, *shape] a weight, k as it comes (16 or more is fastest); it is not kept, so its memory
    may be used again. Chunks are not asked for where the target is already reached.

    Args:
        chunks: the chunks; or a function of indices that gives those of the weights with these indices, always from the
            start and the same. Only with a function can gradients come again, for tensors that do not fit together.
        names: of the weights, for error messages.
        comm: processes that share the work. All call this with the same weights; `chunks` of rank r gives chunks
            r, r + ranks, ... of those of one process; each rank holds a share of the tensors (whole ones, balanced by
            memory). Masks and weights are the same on every rank, bit for bit, and those of one process. What fails on
            one rank raises on all.
        progress: called as progress(stage, done, total) for the stages "gradients", "eliminate" or "score", "move".

    Raises:
        ValueError: as `prune_tensors`; gradients that are not `count`.
        MemoryError: a single tensor would not fit (or not all, and `chunks` is no function), before the first chunk.
        RuntimeError: another rank failed, or has other weights or options.
    """
    if isinstance(method, str) and method in METHODS and not METHODS[method].needs_gradients:
        comm = SINGLE_PROCESS
    with comm.fail_together():
        solver_type = _method(method)
        problem = make_problem(weights, masks, names, _options(options))
        one_of("update", problem.options.update, solver_type.updates)
    comm.assert_equal(lambda: _shared_facts(problem, method, count), "before pruning")
    if problem.is_solved():
        unchanged = [weight.clone() for weight in problem.weights]
        return Pruned([mask.clone() for mask in problem.masks], unchanged, [0.0] * len(unchanged))
    if solver_type.needs_gradients and count < 1:
        raise ValueError(f"{method} needs gradients, and there are none")
    plan = make_plan(problem.names, problem.weights, solver_type, problem.options, count, memory_limit, comm)
    source = chunks if callable(chunks) else _single_pass(chunks, plan, solver_type.advice)
    return PruningStep(problem, solver_type, source, count, plan, comm, progress).run()


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
        kept, errors = remove_lowest_scores(problem, scores)
        return Pruned(kept, masked(problem.weights, kept), errors)


def plan_pruning(
    weights: Sequence[Tensor],
    *,
    method: str = "ovit",
    gradients: int = 4096,
    names: Sequence[str] | None = None,
    memory_limit: int | None = None,
    held_besides: int = 0,
    comm: Comm = SINGLE_PROCESS,
    **options: Unpack[PruneOptions],
) -> Plan:
    """Return how `prune_streamed` would go about these weights with so many gradients, if all of them had to lose some.

    Only shapes and devices are read. `held_besides` are bytes on each device that will be taken by then, and count
    where there is no limit. Raises MemoryError where a single tensor does not fit, on all ranks.
    """
    names = [f"weights[{index}]" for index in range(len(weights))] if names is None else names
    solver_type, read = _method(method), _options(options)
    return make_plan(names, weights, solver_type, read, gradients, memory_limit, comm, held_besides)


def estimate_memory(
    shapes: Sequence[Sequence[int]],
    *,
    method: str = "ovit",
    block: int = 48,
    pattern: PatternLike = "unstructured",
    dtype: torch.dtype = torch.float32,
    gradients: int = 4096,
) -> int:
    """Return the bytes that a method needs at its peak beside weights of these shapes and one chunk of gradients.

    For oViT and oBERT most of it is the inverse Fisher, numel * block numbers; for M-FAC all gradients,
    numel * gradients numbers; the others need a few numbers a weight. Raises ValueError for an unknown method.
    """
    parsed = parse_pattern(pattern)
    sparsity = None if isinstance(parsed, NM) else 0.5
    options = Options(pattern=parsed, sparsity=sparsity, block=block, dtype=dtype)
    return _method(method).memory([torch.Size(shape) for shape in shapes], options, gradients).total


def _method(name: str) -> type[Solver[Any]]:
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, is {name!r}")
    return METHODS[name]


def _options(given: PruneOptions) -> Options:
    """Check what was given and read the pattern."""
    pattern = parse_pattern(given.get("pattern", "unstructured"))
    rest = {key: value for key, value in given.items() if key != "pattern"}
    return Options(pattern=pattern, **rest)  # type: ignore[arg-type]


def _pick(gradients: Sequence[Tensor], indices: Sequence[int], weights: int) -> list[Tensor]:
    if len(gradients) != weights:
        raise ValueError(f"{weights} weights but {len(gradients)} gradients")
    return [gradients[index] for index in indices]


def _single_pass(chunks: Iterable[Sequence[Tensor]], plan: Plan, advice: str) -> GradientSource:
    """Return a source of chunks that come only once, which suffices if all tensors are held together."""
    if len(plan.rounds) > 1:
        raise MemoryError(
            f"second-order pruning needs {plan.needed / GIB:.2f} GiB to hold all tensors together: {advice}, or give "
            "the gradients as a function, so that they can come again"
        )
    return lambda indices: chunks


def _shared_facts(problem: Problem, method: str, count: int) -> dict[str, object]:
    """Return what must be the same on all ranks, by name."""
    facts: dict[str, object] = {"method": method, "the number of gradients": count}
    facts |= {f"option {name}": str(value) for name, value in vars(problem.options).items()}
    facts["the list of weights"] = tuple(problem.names)
    for name, weight, mask in zip(problem.names, problem.weights, problem.masks, strict=True):
        facts[f"the mask of {name}"] = mask
        facts[f"the weight {name}"] = weight
    return facts
