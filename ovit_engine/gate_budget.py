"""A budget of parameters spread evenly over the blocks: about the same share of heads and of units goes in each."""

import math
from collections.abc import Sequence

from ovit_engine.gates import GateSite


def spread_evenly(sites: Sequence[GateSite], budget: int) -> list[int]:
    """How many heads or units of each site are kept, so that at least `budget` parameters go with the others.

    Heads are few, so their share is rounded to the nearest number, half a head down; units make up the rest, to within
    one unit. At least one of each site stays.

    Raises:
        ValueError: more would have to go than there is.
    """
    if (reach := sum((site.count - 1) * site.parameters for site in sites)) < budget:
        raise ValueError(f"{budget} parameters are more than the {reach} that can go")
    heads = [index for index, site in enumerate(sites) if site.kind == "heads"]
    units = [index for index, site in enumerate(sites) if site.kind == "units"]
    off = [0] * len(sites)

    def gone() -> int:
        return sum(number * site.parameters for number, site in zip(off, sites, strict=True))

    def take(indices: Sequence[int]) -> None:
        """One of each site in turn, until the budget is reached or one of each is left."""
        while gone() < budget and any(off[index] < sites[index].count - 1 for index in indices):
            for index in indices:
                if gone() < budget and off[index] < sites[index].count - 1:
                    off[index] += 1

    share = budget / sum(site.count * site.parameters for site in sites)
    for index in heads:
        off[index] = min(sites[index].count - 1, math.ceil(share * sites[index].count - 0.5))
    for index in reversed(heads):
        while gone() > budget and off[index]:
            off[index] -= 1
    if units:
        share = (budget - gone()) / sum(sites[index].count * sites[index].parameters for index in units)
        for index in units:
            off[index] = min(sites[index].count - 1, math.floor(share * sites[index].count))
    take(units)
    take(heads)
    return [site.count - number for site, number in zip(sites, off, strict=True)]
