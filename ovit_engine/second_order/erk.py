"""The Erdos-Renyi-kernel rule: how many weights each tensor keeps (Mocanu et al. 2018; Evci et al. 2020, RigL).

A tensor's density goes with the sum of its dimensions over their product, so small layers stay denser than large ones:
it keeps a number proportional to that sum. Tensors that would keep more than they have stay as they are, and the
others share what is left.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch


def share_out(shapes: Sequence[torch.Size], alive: Sequence[int], keep: int) -> list[int]:
    """How many of its `alive` units each tensor keeps, `keep` in all, which is at most their sum.

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
