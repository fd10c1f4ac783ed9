"""Hooks that keep the tokens to which the class token attends (EViT)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ovit_engine.recomputation import is_recomputed
from ovit_engine.schedule import Schedule
from ovit_engine.tokens.between import BetweenHooks
from ovit_engine.tokens.class_attention import after_stage, ceil_counts, class_attention, keep_attended
from ovit_engine.tokens.gather import Survivors
from ovit_engine.tokens.layout import Layout


def shares_at(step: int, shares: Sequence[float], start: int, end: int) -> list[float]:
    """What stages keep in training at `step`: all until `start`, down a cosine, from `end` on their share."""
    progress = (step - start) / (end - start) if start <= step < end else float(step >= end)
    return [Schedule(1.0, share, "cosine").value(progress) for share in shares]


class AttendedHooks(BetweenHooks):
    """Drops tokens in the blocks at `places`, in each to a share of those that come to it.

    In inference counts are always those of the end of training, whole numbers that are known beforehand.

    Args:
        shares: by stage, of the patch tokens that come to it; rounded up to a count.
        fuse: whether what is dropped leaves one token, their sum weighted by attention.
        readers: whose attention counts: the class token (1), or the distillation token too (2).
        shrink: steps of training between which the share falls from 1.
    """

    def __init__(
        self,
        layout: Layout,
        places: Sequence[int],
        shares: Sequence[float],
        *,
        fuse: bool,
        readers: int,
        shrink: tuple[int, int],
    ) -> None:
        super().__init__(layout, places)
        self.shares, self.fuse, self.readers, self.shrink = list(shares), fuse, readers, shrink
        self.counts = ceil_counts(layout.patches, shares, fuse=fuse)
        self.training_counts: list[int] = []  # of the step that comes
        self.end_step(0)

    def patches_left(self) -> list[tuple[int, int]]:
        left, now = [], self.layout.patches
        for place, keep in zip(self.places, self.counts, strict=True):
            now = after_stage(now, keep, fuse=self.fuse)
            left.append((place, now))
        return left

    def end_step(self, step: int) -> None:
        super().end_step(step)
        now = shares_at(step, self.shares, *self.shrink)
        self.training_counts = ceil_counts(self.layout.patches, now, fuse=self.fuse)

    def begin(self, x: Tensor, *, training: bool) -> None:
        super().begin(x, training=training)
        if training:
            self.survivors = None

    def reduce(
        self, number: int, x: Tensor, queries: Tensor, keys: Tensor, gate: Tensor | None, *, training: bool
    ) -> Tensor:
        keep, prefix = (self.training_counts if training else self.counts)[number], self.layout.prefix
        if keep == x.shape[1] - prefix:
            return x
        attention = class_attention(queries[:, :, : self.readers], keys, prefix, gate)
        x, index = keep_attended(x, attention, keep, prefix, fuse=self.fuse)
        if training and not is_recomputed():
            self._follow(index)
        return x

    def _follow(self, index: Tensor) -> None:
        """Note where the patch tokens come from that are at `index` now; a fused one follows them."""
        before = self.survivors
        origin = index if before is None else before.origin.gather(1, index)
        weight = torch.ones_like(index, dtype=torch.float32) if before is None else before.weight.gather(1, index)
        if self.fuse:
            origin, weight = (torch.cat([part, part.new_zeros(len(part), 1)], dim=1) for part in (origin, weight))
        self.survivors = Survivors(origin, weight)
