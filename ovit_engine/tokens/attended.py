"""Hooks that keep the tokens to which the class token attends (EViT)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ovit_engine.core.schedule import Schedule
from ovit_engine.tokens.between import BetweenHooks
from ovit_engine.tokens.counts import after_stage, ceil_counts
from ovit_engine.tokens.layout import Layout, mean_of_heads
from ovit_engine.tokens.ops import Survivors, gather_tokens, top_tokens, widened, without_autocast
from ovit_engine.utils.autograd import is_recomputed


def class_attention(queries: Tensor, keys: Tensor, prefix: int, gate: Tensor | None = None) -> Tensor:
    """Return how much attention each patch token gets [images, N], mean over heads and queries; at least float32.

    Fused kernels never show the map of attention: of it only the rows of a few queries are computed again, each over
    all P + N keys.

    Args:
        queries: [images, H, queries, C / H], of the class token, and of the distillation token where there is one.
        keys: [images, H, P + N, C / H].
        gate: bool [H], heads that count; all where there is none.
    """
    with without_autocast(queries):
        scores = widened(queries) * queries.shape[-1] ** -0.5 @ widened(keys).transpose(-2, -1)
        return mean_of_heads(scores.softmax(dim=-1)[..., prefix:].mean(dim=2), gate)


def keep_attended(x: Tensor, attention: Tensor, keep: int, prefix: int, *, fuse: bool) -> tuple[Tensor, Tensor]:
    """Return the `keep` patch tokens that get most attention, behind the prefix, and their places [images, keep].

    x [images, P + N, C] becomes [images, P + keep, C]; with `fuse` one more comes last, the sum of the others weighted
    by their attention [images, N], not renormalised (equation 4).
    """
    if not fuse:
        index = top_tokens(attention, keep)
        return gather_tokens(x, index, prefix), index
    order = top_tokens(attention, attention.shape[1])
    index, others = order[:, :keep], order[:, keep:]
    with without_autocast(x):
        weights = attention.gather(1, others).unsqueeze(1)
        fused = weights @ gather_tokens(x[:, prefix:], others, 0).to(weights.dtype)
    return torch.cat([gather_tokens(x, index, prefix), fused.to(x.dtype)], dim=1), index


def shares_at(step: int, shares: Sequence[float], start: int, end: int) -> list[float]:
    """Return what stages keep in training at `step`: all until `start`, down a cosine, from `end` on their share."""
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
