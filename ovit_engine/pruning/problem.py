"""One pruning step as data: the options, the checked tensors and what each must lose, a solver, the result."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Integral, Real
from typing import ClassVar, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from ovit_engine.pruning.memory import Memory
from ovit_engine.pruning.patterns import NM, Pattern, Unstructured

Scope = Literal["global", "layer", "erk"]

Rule = Literal["cumulative", "marginal"]

Update = Literal["joint", "independent", "none"]

# Positions inside a Fisher block are kept as int16.
LARGEST_BLOCK = 32767


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `prune_tensors` was asked to do. Raises ValueError or TypeError for what makes no sense."""

    # Which weights may go together.
    pattern: Pattern = Unstructured()  # noqa: RUF009 (frozen and stateless)
    # Share of all weights that is zero afterwards; None only where the pattern implies it.
    sparsity: float | None = None
    # Count over all tensors together, in each tensor alike, or in each by the Erdos-Renyi-kernel rule.
    scope: Scope = "global"
    # Largest Fisher block.
    block: int = 48
    # lambda of F = lambda I + mean g g^T.
    damp: float = 1e-6
    # What ranks a removal across blocks: the block's error so far, or the largest increment so far.
    rule: Rule = "cumulative"
    # Move the survivors by the exact group formula, by the sum of what each removal alone would ask (obert and mfac as
    # published), or leave them alone.
    update: Update = "joint"
    # Precision of the inverse Fisher and of the elimination.
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            _check_number("sparsity", self.sparsity, Real, "a number between 0 and 1")
        _check_number("block", self.block, Integral, "a whole number")
        _check_number("damp", self.damp, Real, "a number")
        self.pattern.resolve(self.sparsity)
        one_of("scope", self.scope, get_args(Scope))
        one_of("rule", self.rule, get_args(Rule))
        one_of("update", self.update, get_args(Update))
        if not 1 <= self.block <= LARGEST_BLOCK:
            raise ValueError(f"block must be between 1 and {LARGEST_BLOCK}, is {self.block}")
        if not 0 < self.damp < float("inf"):
            raise ValueError(f"damp must be positive and finite, is {self.damp}")
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, is {self.dtype}")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, is {value!r}")


def _check_number(name: str, value: object, kind: type, words: str) -> None:
    """Raise TypeError for text, tensors, truth values and what else is no number."""
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {words}, is {value!r}")


EVERY_UPDATE: tuple[str, ...] = get_args(Update)


# How many more units go from some tensors together: their indices, and a count that is never negative.
Quota = tuple[list[int], int]

# Told how many weights more are done.
Advance = Callable[[int], None]

Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class Problem:
    """Weights with exact zeros where their masks (True = kept) say so."""

    names: Sequence[str]
    weights: Sequence[Tensor]
    masks: Sequence[Tensor]
    options: Options
    # What has to go, by scope; none for N:M, where each group decides for itself.
    quotas: Sequence[Quota]
    # Shapes of all tensors of the event, also where this is a part of it.
    shapes: Sequence[torch.Size]

    def part(self, indices: Sequence[int]) -> "Problem":
        """Some of the tensors, with the quotas that concern no others."""
        place = {index: number for number, index in enumerate(indices)}
        quotas = [([place[i] for i in scope], count) for scope, count in self.quotas if place.keys() >= set(scope)]
        names, weights = [self.names[i] for i in indices], [self.weights[i] for i in indices]
        return Problem(names, weights, [self.masks[i] for i in indices], self.options, quotas, self.shapes)

    def alive_units(self, index: int) -> Tensor:
        """Return which units of a tensor still have a weight, [units] in layout order."""
        return _alive_units(self.masks[index], self.options)

    def group_quotas(self, index: int) -> Tensor:
        """For N:M: how many more weights each group of a tensor loses, [groups] in layout order."""
        pattern = self.options.pattern
        assert isinstance(pattern, NM)
        kept = pattern.to_layout(self.masks[index]).reshape(-1, pattern.group).sum(1)
        return (kept - pattern.keep).clamp(min=0)

    def is_solved(self) -> bool:
        """Return whether the masks already reach the target, so that nothing may change."""
        if isinstance(self.options.pattern, NM):
            return not any(bool(self.group_quotas(index).any()) for index in range(len(self.weights)))
        return all(count == 0 for _, count in self.quotas)


@dataclass(frozen=True)
class Pruned:
    """What comes out: one entry a tensor each."""

    # Boolean, True = kept.
    masks: list[Tensor]
    # Updated survivors, exact zeros elsewhere.
    weights: list[Tensor]
    # What the method itself predicts: oViT the increase of the loss with survivors moved to the best place; the others
    # the sum of what each removal costs alone, which magnitude takes for half the squared length of what went.
    errors: list[float]
    # How often the gradients came: more than once where memory did not hold all tensors together.
    passes: int = 0
    # Seconds by stage: gradients, exchange (between ranks), fisher, eliminate or score, allocate, move.
    timings: dict[str, float] = field(default_factory=dict)


class Solver(ABC, Generic[Candidate]):
    """A method on the tensors that are held together: it observes gradients, says what removals cost, and moves.

    Between the two others decide, who may know more tensors. A candidate is what it says of one tensor; it stays in
    memory when the solver is freed, and a solver that has observed the same gradients again can go on from there.
    """

    # Whether observe() is called at all.
    needs_gradients: ClassVar[bool] = True
    # Values of the option `update` that it knows.
    updates: ClassVar[tuple[str, ...]] = EVERY_UPDATE
    # What to do where memory is short.
    advice: ClassVar[str] = "use a smaller block, or leave it out of the targets"
    # What finding the candidates is called: "eliminate" or "score".
    stage: ClassVar[str] = "score"

    def __init__(self, problem: Problem, count: int) -> None:
        self._problem, self._count = problem, count

    @classmethod
    @abstractmethod
    def memory(cls, shapes: Sequence[torch.Size], options: Options, count: int) -> Memory:
        """Return what it needs for weights of these shapes and `count` gradients."""

    @classmethod
    def moves(cls, options: Options) -> bool:
        """Return whether `move` does more than to set zeros, so that the gradients are needed for it."""
        return options.update != "none"

    @classmethod
    @abstractmethod
    def choose(cls, problem: Problem, candidates: Sequence[Candidate]) -> tuple[list[Tensor], list[float]]:
        """Return masks and predicted errors, one a tensor."""

    def observe(self, chunk: Sequence[Tensor]) -> None:
        """Take the next gradients [k, *shape], one tensor a weight; they are not kept."""
        raise AssertionError(f"{type(self).__name__} takes no gradients")

    @abstractmethod
    def candidates(self, advance: Advance) -> list[Candidate]:
        """Return what removals cost, one entry a tensor, once all gradients came."""

    def move(self, masks: Sequence[Tensor], candidates: Sequence[Candidate], advance: Advance) -> list[Tensor]:
        """Return new weights under new masks; free what was held."""
        raise AssertionError(f"{type(self).__name__} moves no survivors")


def make_problem(
    weights: Sequence[Tensor], masks: Sequence[Tensor] | None, names: Sequence[str] | None, options: Options
) -> Problem:
    """Check weights and masks against each other and the pattern. Raises ValueError or TypeError naming the tensor."""
    check_tensors("weights", weights)
    if masks is not None:
        check_tensors("masks", masks)
    if not weights:
        raise ValueError("no weights to prune")
    names = [f"weights[{index}]" for index in range(len(weights))] if names is None else list(names)
    if len(names) != len(weights):
        raise ValueError(f"{len(weights)} weights but {len(names)} names")
    if masks is not None and len(masks) != len(weights):
        raise ValueError(f"{len(weights)} weights but {len(masks)} masks")
    plain = [weight.detach() for weight in weights]
    for name, weight in zip(names, plain, strict=True):
        _check_weight(name, weight)
    kept = [torch.ones_like(weight, dtype=torch.bool) for weight in plain] if masks is None else list(masks)
    for name, weight, mask in zip(names, plain, kept, strict=True):
        _check_mask(name, weight, mask, options)
    kept = [mask.to(weight.device) for mask, weight in zip(kept, plain, strict=True)]
    zeroed = [torch.where(mask, weight, 0) for mask, weight in zip(kept, plain, strict=True)]
    return Problem(names, zeroed, kept, options, _quotas(kept, options), [weight.shape for weight in plain])


def _alive_units(mask: Tensor, options: Options) -> Tensor:
    return options.pattern.to_layout(mask).reshape(-1, options.pattern.unit).any(1)


def _quotas(masks: Sequence[Tensor], options: Options) -> list[Quota]:
    if isinstance(options.pattern, NM):
        return []
    alive = [int(_alive_units(mask, options).sum()) for mask in masks]
    units = [mask.numel() // options.pattern.unit for mask in masks]
    every = list(range(len(masks)))
    sparsity = options.pattern.resolve(options.sparsity)
    quotas = []
    for scope in [[index] for index in every] if options.scope == "layer" else [every]:
        total, left = sum(units[index] for index in scope), sum(alive[index] for index in scope)
        quotas.append((scope, max(0, round(sparsity * total) - (total - left))))
    if options.scope == "erk":
        kept = erk_counts([mask.shape for mask in masks], alive, sum(alive) - quotas[0][1])
        return [([index], alive[index] - kept[index]) for index in every]
    return quotas


def erk_counts(shapes: Sequence[torch.Size], alive: Sequence[int], keep: int) -> list[int]:
    """Return how many of its `alive` units each tensor keeps by the Erdos-Renyi-kernel rule, `keep` in all.

    What rounding leaves goes to the largest remainders, ties by place.
    """
    sums = [max(1, sum(shape)) for shape in shapes]
    kept = list(alive)
    waiting = list(range(len(shapes)))
    rate = Fraction(0)
    while waiting:
        left = keep - sum(kept[index] for index in range(len(shapes)) if index not in waiting)
        rate = Fraction(left, sum(sums[index] for index in waiting))
        room = [index for index in waiting if rate * sums[index] < alive[index]]
        if len(room) == len(waiting):
            break
        waiting = room
    for index in waiting:
        kept[index] = math.floor(rate * sums[index])
    by_remainder = sorted(waiting, key=lambda index: kept[index] - rate * sums[index])
    for index in by_remainder[: keep - sum(kept)]:
        kept[index] += 1
    return kept


def check_tensors(what: str, tensors: object) -> None:
    """Raise TypeError unless `tensors` is a list or tuple of them."""
    if not isinstance(tensors, Sequence) or isinstance(tensors, str):
        raise TypeError(f"{what} must be a list of tensors, are a {type(tensors).__name__}")
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what}[{index}] must be a tensor, is a {type(tensor).__name__}")


def check_gradients(gradients: Sequence[Tensor]) -> None:
    """Raise TypeError unless `gradients` are a list of floating tensors that stack one gradient or more."""
    check_tensors("gradients", gradients)
    for index, gradient in enumerate(gradients):
        if not gradient.is_floating_point():
            raise TypeError(f"gradients[{index}] must be floating point, are {gradient.dtype}")
        if gradient.ndim == 0:
            raise TypeError(f"gradients[{index}] must be stacked as [N, *shape of the weight], is a single number")


def _check_weight(name: str, weight: Tensor) -> None:
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ValueError(f"{name}: weights must be floating point (16 bits or more), are {weight.dtype}")
    if weight.layout != torch.strided or weight.is_meta:
        raise ValueError(f"{name}: weights must be dense tensors with values, not {weight.layout} on {weight.device}")
    if weight.numel() == 0:
        raise ValueError(f"{name}: no elements, shape {tuple(weight.shape)}")
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{name}: non-finite weight")


def _check_mask(name: str, weight: Tensor, mask: Tensor, options: Options) -> None:
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"{name}: a mask must be boolean of shape {tuple(weight.shape)}, is {mask.dtype} of {tuple(mask.shape)}"
        )
    try:
        options.pattern.check(weight.shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
