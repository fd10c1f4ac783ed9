"""How many units each block loses: an exact count over a scope, from the costs that elimination recorded.

Two rules. *cumulative* (Algorithm 1 of oViT, the published code) ranks a removal by its block's error so far and so
minimises the largest error of a block; *marginal* (the text of section 3.2) ranks by the largest increment so far and
so is the greedy choice on the sum of errors. A block's error grows with its size: where sizes differ, *cumulative*
compares errors a weight (by the plain error, a tensor smaller than a block lost 97 % where others lost 75 %).
Increments are not monotone, hence the running maximum. Both rank by numbers that never fall inside a block, so what is
taken from a block is always a prefix of its order.
"""

import torch
from torch import Tensor

from ovit_engine.second_order.options import Rule


def rank(costs: Tensor, rule: Rule, scale: float = 1.0) -> Tensor:
    """Ranking [blocks, steps], inf where nothing is to be removed (negative costs, see `eliminate`).

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
    """The `count` lowest entries over all rankings, as booleans of their shapes; ties by list, block and step."""
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
