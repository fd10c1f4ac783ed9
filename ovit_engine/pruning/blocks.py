"""The weights of a problem cut into Fisher blocks, and put together again with survivors moved."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ovit_engine.pruning.patterns import Pattern
from ovit_engine.pruning.problem import Advance, Problem

# Entries of the matrices worked on at once: 256 MiB of float32, enough for any GPU.
_LARGEST_CHUNK = 2**26


@dataclass(frozen=True)
class Segment:
    """A run of equally large blocks of one tensor, in the pattern's layout."""

    # Index of the tensor.
    tensor: int
    # Where the run starts.
    offset: int
    # Blocks in the run.
    count: int
    # Weights a block.
    size: int

    def cut(self, flat: Tensor) -> Tensor:
        """Return the segment's part [..., count, size] of a tensor [..., numel] in layout order: a view."""
        part = flat[..., self.offset : self.offset + self.count * self.size]
        return part.unflatten(-1, (self.count, self.size))  # type: ignore[no-untyped-call,no-any-return]


def partition(numel: int, block: int, group: int) -> list[tuple[int, int, int]]:
    """Cut `numel` weights into at most two runs (offset, count, size) of blocks no larger than `block`.

    Sizes are multiples of `group`. Raises ValueError if a block cannot hold one group.
    """
    if group > block:
        raise ValueError(f"block {block} is smaller than the pattern's group of {group} weights")
    groups = numel // group
    count = -(-groups // (block // group))
    small, large_count = divmod(groups, count)
    runs = [(0, large_count, (small + 1) * group)] if large_count else []
    return [*runs, (large_count * (small + 1) * group, count - large_count, small * group)]


def segments(shapes: Sequence[torch.Size], pattern: Pattern, block: int) -> list[Segment]:
    """Return the segments of all tensors, in order."""
    return [
        Segment(index, offset, count, size)
        for index, shape in enumerate(shapes)
        for offset, count, size in partition(shape.numel(), block, pattern.group)
    ]


def matrix_entries(shapes: Sequence[torch.Size], pattern: Pattern, block: int) -> int:
    """Entries of the Fisher matrices of all blocks."""
    return sum(each.count * each.size**2 for each in segments(shapes, pattern, block))


def blocks_a_chunk(entries: int, segment: Segment, on_cpu: bool) -> int:
    """Return how many blocks to work on at once, where the matrices of all blocks of an event have so many entries.

    A thirty-second of them, so that temporaries stay small beside the inverse Fisher. On a CPU no more than fits its
    caches; a GPU wants as many as memory allows. What else is held at the time plays no part, so neither memory nor
    other processes change a result by rounding.
    """
    share = max(min(entries // 32, _LARGEST_CHUNK), 2**16) // segment.size**2
    return max(1, min(segment.count, share, 64 if on_cpu else segment.count))


# What to add to the weights of a slice of blocks of a segment when `removed` [c, B] of them go: [c, B].
Change = Callable[[int, slice, Tensor], Tensor]


class Blocks:
    """Runs of equally large blocks (`segments`), and which of their weights are there, in the pattern's layout."""

    def __init__(self, problem: Problem) -> None:
        options = problem.options
        self.problem = problem
        self.segments = segments([weight.shape for weight in problem.weights], options.pattern, options.block)
        self._entries = matrix_entries(problem.shapes, options.pattern, options.block)
        self.kept = [options.pattern.to_layout(mask) for mask in problem.masks]
        self.has_pruned = [not bool(mask.all()) for mask in problem.masks]

    def chunks(self, number: int) -> Iterator[slice]:
        """Return the blocks of a segment, as many at once as is fast and small."""
        segment = self.segments[number]
        on_cpu = self.problem.weights[segment.tensor].device.type == "cpu"
        step = blocks_a_chunk(self._entries, segment, on_cpu)
        return (slice(start, min(start + step, segment.count)) for start in range(0, segment.count, step))

    def weights(self, number: int) -> Tensor:
        """Return the weights of a segment [blocks, B] in their own type."""
        segment = self.segments[number]
        return segment.cut(self.problem.options.pattern.to_layout(self.problem.weights[segment.tensor]))

    def finish(self) -> None:
        """Take gradients that still wait."""

    def release(self, number: int) -> None:
        """Free what is held for a segment that is done."""

    def move(self, masks: Sequence[Tensor], change: Change, advance: Advance) -> list[Tensor]:
        """Return new weights under new masks, survivors moved by `change` where a block loses something."""
        pattern, dtype = self.problem.options.pattern, self.problem.options.dtype
        flat = [
            pattern.to_layout(weight).to(torch.promote_types(weight.dtype, dtype), copy=True)
            for weight in self.problem.weights
        ]
        kept = [pattern.to_layout(mask) for mask in masks]
        for number in range(len(self.segments)):
            self._move(number, flat, kept, change, advance)
            self.release(number)
        return [
            pattern.from_layout(torch.where(mask, new, 0).to(weight.dtype), weight.shape)
            for weight, new, mask in zip(self.problem.weights, flat, kept, strict=True)
        ]

    def _move(self, number: int, flat: list[Tensor], kept: list[Tensor], change: Change, advance: Advance) -> None:
        """Move the weights of one segment, in place in `flat`."""
        segment = self.segments[number]
        removed = segment.cut(self.kept[segment.tensor]) & ~segment.cut(kept[segment.tensor])
        for here in self.chunks(number):
            if removed[here].any():
                part = segment.cut(flat[segment.tensor])[here]
                part += change(number, here, removed[here]).to(part.dtype)
            advance((here.stop - here.start) * segment.size)


def in_small_groups(indices: Tensor, size: int = 4) -> Iterator[Tensor]:
    """Indices of blocks that need float64, a few at a time; nothing for none."""
    return (indices[start : start + size] for start in range(0, len(indices), size))
