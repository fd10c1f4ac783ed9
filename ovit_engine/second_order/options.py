"""The options of one pruning event, checked once."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

import torch

from ovit_engine.pattern import Pattern, Unstructured

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
            _number("sparsity", self.sparsity, Real, "a number between 0 and 1")
        _number("block", self.block, Integral, "a whole number")
        _number("damp", self.damp, Real, "a number")
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


def _number(name: str, value: object, kind: type, words: str) -> None:
    """Raise TypeError for text, tensors, truth values and what else is no number."""
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {words}, is {value!r}")
