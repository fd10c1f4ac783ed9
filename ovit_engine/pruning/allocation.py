"""Choose which units to remove: rank removals across blocks, take the lowest of a scope, and make masks of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ovit_engine.pruning.patterns import NM
from ovit_engine.pruning.problem import Problem, Rule


def rank(costs: Tensor, rule: Rule, scale: float = 1.0) -> Tensor:
    """Return the ranking [blocks, steps], inf where nothing is to be removed (negative costs, see `eliminate`).

    `scale` of the cumulative rule is the size of the largest block over that of these.
    """
    candidate = costs >= 0
    increments = torch.where(candidate, costs, 0)
    if rule == "cumulative":
        largest = torch.finfo(costs.dtype).max
        ranking = increments.cumsum(1, dtype=torch.float64).mul_(scale).clamp_(max=largest).to(costs.dtype)
    else:
        ranking = increments.cummax(1).values
    return ranking.masked_fill_(~candidate, torch.inf)


def take_lowest(rankings: list[Tensor], count: int) -> list[Tensor]:
    """Return the `count` lowest entries of all rankings, as booleans of their shapes; ties by list, block and step."""
    flat = torch.cat([ranking.flatten() for ranking in rankings])
    if count == 0:
        taken = torch.zeros_like(flat, dtype=torch.bool)
    else:
        last = flat.kthvalue(count).values
        taken = flat < last
        ties = (flat == last).nonzero().squeeze(1)
        taken[ties[: count - int(taken.sum())]] = True
    parts = torch.split(taken, [ranking.numel() for ranking in rankings])
    return [part.reshape(ranking.shape) for part, ranking in zip(parts, rankings, strict=True)]


def remove_lowest(problem: Problem, costs: Sequence[Tensor]) -> list[Tensor]:
    """Return masks (True = kept) without the units of lowest cost; ties go by position, tensor after tensor.

    `costs` are [units] in the pattern's layout, one a tensor; those of units pruned before do not matter.
    Raises FloatingPointError, with the tensor's name, for a cost that is NaN.
    """
    for name, cost in zip(problem.names, costs, strict=True):
        if bool(cost.isnan().any()):
            raise FloatingPointError(f"{name}: a score is NaN; are weights or gradients beyond the range of floats?")
    pattern = problem.options.pattern
    if isinstance(pattern, NM):
        return [_lowest_of_groups(problem, index, cost) for index, cost in enumerate(costs)]
    masks = list(problem.masks)
    for scope, count in problem.quotas:
        ranking = [_bounded(costs[i]).masked_fill(~problem.alive_units(i), torch.inf).cpu() for i in scope]
        for index, taken in zip(scope, take_lowest(ranking, count), strict=True):
            goes = taken.to(masks[index].device).repeat_interleave(pattern.unit)
            masks[index] = masks[index] & ~pattern.from_layout(goes, masks[index].shape)
    return masks


def remove_lowest_scores(problem: Problem, scores: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
    """Return masks by one score a weight (shaped as the weight), summed over a tile; and the sum of those that went."""
    pattern = problem.options.pattern
    units = [pattern.to_layout(score).reshape(-1, pattern.unit).sum(1) for score in scores]
    masks = remove_lowest(problem, units)
    gone = [before & ~after for before, after in zip(problem.masks, masks, strict=True)]
    errors = [float(score[went].sum(dtype=torch.float64)) for score, went in zip(scores, gone, strict=True)]
    return masks, errors


def masked(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """Return the weights with exact zeros where masks say so."""
    return [torch.where(mask, weight, 0) for mask, weight in zip(masks, weights, strict=True)]


def _lowest_of_groups(problem: Problem, index: int, costs: Tensor) -> Tensor:
    """Return the mask of one tensor under N:M, which is a matter of each group."""
    pattern, mask = problem.options.pattern, problem.masks[index]
    return pattern.mask(pattern.from_layout(_bounded(costs), mask.shape).masked_fill(~mask, -torch.inf))


def _bounded(costs: Tensor) -> Tensor:
    """Finite, so that nothing that is there ranks with what has gone."""
    largest = torch.finfo(costs.dtype).max
    return costs.clamp(-largest, largest)
