"""Neighboring heads and units that are kept or removed together, so that the patterns of their weights hold.

Removing one column of a 2:4 weight would move all later columns into other groups of four. So under such a pattern
units are chosen in fours, and every disabled unit can really be removed.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ovit_engine.pruning.patterns import NM, Block, Pattern
from ovit_engine.structured.gates import GateSite

Tile = tuple[int, int]  # rows and columns of a weight [out, in] that its pattern holds together

FREE: Tile = (1, 1)


def tile_of(pattern: Pattern) -> Tile:
    """Return the rows and columns of a weight that a pattern holds together."""
    if isinstance(pattern, Block):
        return pattern.rows, pattern.cols
    return (1, pattern.group) if isinstance(pattern, NM) else FREE


def tiles_of(patterns: Iterable[Mapping[str, Pattern]]) -> dict[str, Tile]:
    """Return the tile of each weight by name, which may follow several patterns."""
    tiles: dict[str, Tile] = {}
    for each in patterns:
        for name, pattern in each.items():
            (rows, columns), (more_rows, more_columns) = tiles.get(name, FREE), tile_of(pattern)
            tiles[name] = math.lcm(rows, more_rows), math.lcm(columns, more_columns)
    return tiles


@dataclass(frozen=True)
class Groups:
    """`count` heads or units in groups of `size` neighbours; the last may be smaller."""

    count: int
    size: int = 1

    @classmethod
    def of(cls, site: GateSite, tiles: Mapping[str, Tile]) -> "Groups":
        """Return the groups of a site by the tiles of its weights [out, in]: rows of `source`, columns of `linear`."""
        rows, columns = tiles.get(f"{site.source_name}.weight", FREE)[0], tiles.get(f"{site.name}.weight", FREE)[1]
        return cls(site.count, math.lcm(rows, columns, site.width) // site.width)

    @property
    def number(self) -> int:
        """How many groups there are."""
        return -(-self.count // self.size)

    def members(self, kept: int) -> int:
        """Return how many heads or units `kept` groups hold, if a smaller last group is kept."""
        return min(self.count, self.count - (self.number - kept) * self.size)

    def of_scores(self, scores: Tensor) -> Tensor:
        """Return the mean score of each group [number] from those of heads or units [count]."""
        return scores if self.size == 1 else torch.stack([part.mean() for part in torch.split(scores, self.size)])

    def of_gate(self, gate: Tensor) -> Tensor:
        """Return which groups are on, bool [number], from a gate [count]: those with any unit on."""
        return gate if self.size == 1 else torch.stack([part.any() for part in torch.split(gate, self.size)])

    def spread(self, keep: Tensor) -> Tensor:
        """Return the gate [count] that keeps these groups [number]."""
        return keep.repeat_interleave(self.size)[: self.count]
