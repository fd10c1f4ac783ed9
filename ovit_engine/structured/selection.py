"""Which heads and units are kept: counts, swaps and budgets on plain tensors. Each layer keeps at least one.

`keep` is boolean [count] and `scores` float [count], one of each a layer; the lowest scores go first, ties by layer and
index. What is off already stays off.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ovit_engine.pruning.allocation import take_lowest
from ovit_engine.structured.gates import GateSite


def kept_count(count: int, sparsity: float) -> int:
    """Return how many of `count` are kept: rounded down, as S2ViTE's code does, and at least 1.

    By the decimals as they are written: 0.8 off ten leaves two, which floats get wrong.
    """
    return max(1, math.floor(count * (1 - Fraction(repr(sparsity)))))


def swap_count(active: int, share: float, least: int) -> int:
    """Return how many of `active` move: `share` rounded up and at least `least`, or rounded down where that is 0."""
    if least == 0:
        return math.floor(share * active)
    return min(active, max(math.ceil(share * active), least))


def swap(keep: Tensor, drop: Tensor, grow: Tensor, count: int) -> Tensor:
    """Switch off the `count` of lowest `drop`, then on the `count` of highest `grow` among all that are off then.

    What was just switched off may come back, so the number that is on never changes.
    """
    (dropped,) = take_lowest([_ranked(drop).masked_fill(~keep.cpu(), torch.inf)], count)
    kept = keep.cpu() & ~dropped
    (grown,) = take_lowest([_ranked(-grow).masked_fill(kept, torch.inf)], count)
    return (kept | grown).to(keep.device)


def keep_best(keeps: Sequence[Tensor], scores: Sequence[Tensor], kept: int) -> list[Tensor]:
    """Keep `kept` over all layers together, or what is on if that is less, or one a layer if that is more."""
    rankings = [_protected(keep, score) for keep, score in zip(keeps, scores, strict=True)]
    total = sum(keep.numel() for keep in keeps)
    off = take_lowest(rankings, max(0, total - max(kept, len(keeps))))
    return [keep & ~gone.to(keep.device) for keep, gone in zip(keeps, off, strict=True)]


def keep_within(keeps: Sequence[Tensor], scores: Sequence[Tensor], sizes: Sequence[int], budget: int) -> list[Tensor]:
    """Switch off what has `sizes[layer]` (parameters, say) each, until nothing else fits into `budget` of them.

    In the order of scores; one that does not fit is passed over. What is off already counts towards the budget.
    """
    after = [keep.tolist() for keep in keeps]
    left = budget - sum(int((~keep).sum()) * size for keep, size in zip(keeps, sizes, strict=True))
    places = [(layer, index) for layer, keep in enumerate(keeps) for index in range(keep.numel())]
    values, order = torch.cat([_protected(keep, score) for keep, score in zip(keeps, scores, strict=True)]).sort(
        stable=True
    )
    smallest = min(sizes)
    for value, place in zip(values.tolist(), order.tolist(), strict=True):
        if left < smallest or value == math.inf:
            break
        layer, index = places[place]
        if sizes[layer] <= left and after[layer][index]:
            after[layer][index] = False
            left -= sizes[layer]
    return [torch.tensor(keep, device=before.device) for keep, before in zip(after, keeps, strict=True)]


def _protected(keep: Tensor, scores: Tensor) -> Tensor:
    """Return an order in which what is off comes first, and the best of what is on last."""
    on, ranking = keep.cpu(), _ranked(scores)
    best = len(ranking) - 1 - int(ranking.masked_fill(~on, -torch.inf).flip(0).argmax())
    ranking = ranking.masked_fill(~on, -torch.inf)
    ranking[best] = torch.inf
    return ranking


def _ranked(scores: Tensor) -> Tensor:
    """Return finite scores on the CPU, where choosing the lowest is deterministic."""
    wide = scores.detach().double().cpu()
    if bool(wide.isnan().any()):
        raise FloatingPointError("a score is NaN, so heads and units can't be compared: did training diverge?")
    largest = torch.finfo(wide.dtype).max
    return wide.clamp(-largest, largest)


def spread_evenly(sites: Sequence[GateSite], budget: int) -> list[int]:
    """Return how many heads or units each site keeps, so that the others have at least `budget` parameters.

    Heads are few, so their share is rounded to the nearest number, half a head down; units make up the rest, to within
    one unit. At least one of each site stays.

    Raises:
        ValueError: more would have to go than there is.
    """
    sizes = [site.parameters for site in sites]
    if (reach := sum((site.count - 1) * size for site, size in zip(sites, sizes, strict=True))) < budget:
        raise ValueError(f"{budget} parameters are more than the {reach} that can go")
    heads = [index for index, site in enumerate(sites) if site.kind == "heads"]
    units = [index for index, site in enumerate(sites) if site.kind == "units"]
    off = [0] * len(sites)

    def gone() -> int:
        return sum(number * size for number, size in zip(off, sizes, strict=True))

    def take(indices: Sequence[int]) -> None:
        """Remove one of each site in turn, until the budget is reached or one of each is left."""
        while gone() < budget and any(off[index] < sites[index].count - 1 for index in indices):
            for index in indices:
                if gone() < budget and off[index] < sites[index].count - 1:
                    off[index] += 1

    share = budget / sum(site.count * size for site, size in zip(sites, sizes, strict=True))
    for index in heads:
        off[index] = min(sites[index].count - 1, math.ceil(share * sites[index].count - 0.5))
    for index in reversed(heads):
        while gone() > budget and off[index]:
            off[index] -= 1
    if units:
        share = (budget - gone()) / sum(sites[index].count * sizes[index] for index in units)
        for index in units:
            off[index] = min(sites[index].count - 1, math.floor(share * sites[index].count))
    take(units)
    take(heads)
    return [site.count - number for site, number in zip(sites, off, strict=True)]
