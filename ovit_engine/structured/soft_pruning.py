"""Soft pruning: quadratic penalties that shrink groups of weights toward zero before removal (GOHSP's second stage).

ADMM on "at most so many groups differ from zero" (Boyd et al. 2011, §9.1): with weights W, a copy Z that meets the
bound, and a scaled dual U, training minimises loss(W) + rho/2 ||W - Z + U||^2, and once an interval

    Z <- project(W + U): the groups of largest L2 norm stay, the others become zero;  U <- U + W - Z.

After that Z is zero where a group goes and U where it stays, so that one tensor, `target` = Z - U, holds both:
W + U where the group stays, -(W + U) where it goes. The penalty's gradient is rho (W - target). All functions take
tensors of one shape and a boolean `keep` that broadcasts over them (True = the group stays).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ovit_engine.structured.gates import GroupLayout


def group_norms(layouts: Sequence[GroupLayout], tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of each group over all its tensors, float32 [count]."""
    squares = [layout.sums(each.detach().float().square()) for layout, each in zip(layouts, tensors, strict=True)]
    return torch.stack(squares).sum(0).sqrt()


def first_target(weight: Tensor, keep: Tensor) -> Tensor:
    """Return Z - U as soft pruning starts, float32: U is zero, Z the weight where the group stays."""
    return weight.detach().float().masked_fill(~keep, 0.0)


def dual(target: Tensor, keep: Tensor) -> Tensor:
    """Return U of a target."""
    return target.masked_fill(keep, 0.0).neg_()


def next_target(shifted: Tensor, keep: Tensor) -> Tensor:
    """Return Z - U after a step of both, from `shifted` = W + U and the groups `keep` that its projection keeps."""
    return torch.where(keep, shifted, -shifted)


def rescaled(target: Tensor, keep: Tensor, factor: float) -> Tensor:
    """Return Z - U after rho grew by `factor`: U is the multiplier over rho (Boyd et al. 2011, §3.4.1)."""
    return torch.where(keep, target, target / factor)


def distance(weight: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """Return ||W - Z||^2, float32 scalar."""
    return (weight.detach().float() - target.masked_fill(~keep, 0.0)).square().sum()
