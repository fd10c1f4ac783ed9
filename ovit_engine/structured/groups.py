"""Neighbouring heads and units that must stay or go together, so that patterns of the weights beside them hold.

Taking one column out of a 2:4 weight would move all that follow into other groups of four. So under such a pattern
units are chosen by fours, and every one that is off can really leave.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ovit_engine.pruning.patterns import NM, Block, Pattern
from ovit_engine.structured.gates import GateSite

Tile = tuple[int, int]  # rows and columns of a weight [out, in] that its pattern holds together

FREE: Tile = (1, 1)


def tile_of(pattern: Pattern) -> Tile:
    """Which neighbours of a weight can't be told apart by removing rows or columns."""
    if isinstance(pattern, Block):
        return pattern.rows, pattern.cols
    return (1, pattern.group) if isinstance(pattern, NM) else FREE


def common_tile(one: Tile, other: Tile) -> Tile:
    """Return the tile of a weight that follows two patterns."""
    return math.lcm(one[0], other[0]), math.lcm(one[1], other[1])


@dataclass(frozen=True)
class Groups:
    """How `count` heads or units fall into groups of `size` neighbours; the last may be smaller."""

    count: int
    size: int = 1

    @classmethod
    def of(cls, site: GateSite, tiles: Mapping[str, Tile]) -> "Groups":
        """Those of a site whose weights [out, in] have these tiles, by name: rows of `source`, columns of `linear`."""
        rows, columns = tiles.get(f"{site.source_name}.weight", FREE)[0], tiles.get(f"{site.name}.weight", FREE)[1]
        return cls(site.count, math.lcm(rows, columns, site.width) // site.width)

    @property
    def number(self) -> int:
        """How many groups there are."""
        return -(-self.count // self.size)

    def members(self, kept: int) -> int:
        """How many heads or units so many groups hold, if a smaller last one is not among those that go."""
        return min(self.count, self.count - (self.number - kept) * self.size)

    def of_scores(self, scores: Tensor) -> Tensor:
        """Scores of groups [number] from those of heads or units [count]: their means."""
        return scores if self.size == 1 else torch.stack([part.mean() for part in torch.split(scores, self.size)])

    def of_gate(self, gate: Tensor) -> Tensor:
        """Which groups are on, bool [number], from a gate [count]: those of which anything is."""
        return gate if self.size == 1 else torch.stack([part.any() for part in torch.split(gate, self.size)])

    def spread(self, keep: Tensor) -> Tensor:
        """The gate [count] of groups [number] that are kept."""
        return keep.repeat_interleave(self.size)[: self.count]
