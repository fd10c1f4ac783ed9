"""Merging tokens that are alike. Pure functions, written from the paper.

ToMe, arXiv 2210.09461, section 3. Letters: P prefix tokens, N patch tokens, r of them that go; C width. Of all tokens
those in even places make the set A (the class token among them), those in odd places the set B.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ovit_engine.tokens.between import BetweenHooks
from ovit_engine.tokens.counts import merged_counts
from ovit_engine.tokens.layout import Layout, mean_of_heads
from ovit_engine.tokens.ops import Survivors, widened, without_autocast
from ovit_engine.utils.autograd import is_recomputed


class Matching(NamedTuple):
    """Which patch tokens of A go into which of B: places among the patch tokens of A and of B, int64."""

    sources: Tensor  # [images, r] in A, the most alike first
    targets: Tensor  # [images, r] in B, one for each source
    rest: Tensor  # [images, |A| - r] in A, those that stay, in their order


def match_tokens(metric: Tensor, prefix: int, amount: int) -> Matching:
    """The `amount` pairs of patch tokens, one of A and one of B, that are most alike by the cosine of their metric.

    metric [images, P + N, width], the mean of the keys over heads. Each token of A goes with its best of B, several
    perhaps with one. Prefix tokens are in no pair. `amount` is between 1 and N // 2.
    """
    with torch.no_grad(), without_autocast(metric):
        even, odd = _halves(normalize(widened(metric), dim=-1), prefix)
        likeness, best = (even @ odd.transpose(1, 2)).max(dim=-1)
        order = likeness.topk(likeness.shape[1], dim=1).indices
        sources, rest = order[:, :amount], order[:, amount:]
        # sorted by topk, whose count is a constant when exported: that of sort would be asked of a shape
        rest = rest.topk(rest.shape[1], dim=1, largest=False).values
        return Matching(sources, best.gather(1, sources), rest)


def merge_tokens(x: Tensor, sizes: Tensor, matching: Matching, prefix: int) -> tuple[Tensor, Tensor]:
    """Tokens x [images, P + N, C] with matched ones averaged by size, and how many patches each now stands for.

    The prefix comes first, then what is left of A, then B, each in its order: P + N - r tokens.

    Args:
        sizes: [images, P + N], float32, how many patches each token of x stands for.
    """
    kind = x.dtype
    with without_autocast(x):
        x = widened(x)
        sizes = sizes.to(x.dtype)
        even, odd = _halves(x, prefix)
        even_sizes, odd_sizes = _halves(sizes.unsqueeze(-1), prefix)
        # a product with a matrix of zeros and ones: not all exporters and runtimes have scatter_reduce
        places = torch.arange(odd.shape[1], device=x.device)
        into = (matching.targets.unsqueeze(1) == places.unsqueeze(-1)).to(x.dtype)  # [images, |B|, r]
        gone = _take_tokens(even_sizes, matching.sources)
        merged_sizes = odd_sizes + into @ gone
        merged = (odd * odd_sizes + into @ (_take_tokens(even, matching.sources) * gone)) / merged_sizes
    tokens = torch.cat([x[:, :prefix], _take_tokens(even, matching.rest), merged], dim=1)
    left = torch.cat([_take_tokens(even_sizes, matching.rest), merged_sizes], dim=1).squeeze(-1)
    return tokens.to(kind), torch.cat([sizes[:, :prefix], left], dim=1)


def follow_places(origin: Tensor, matching: Matching, prefix: int) -> Tensor:
    """Where the patch tokens that `merge_tokens` gives come from: origin [B, N] of those before; of B where merged."""
    padded = torch.cat([origin.new_zeros(len(origin), prefix), origin], dim=1).unsqueeze(-1)
    even, odd = _halves(padded, prefix)
    return torch.cat([_take_tokens(even, matching.rest), odd], dim=1).squeeze(-1)


def _halves(x: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Return the patch tokens of x [images, P + N, C] that are in A, and those in B."""
    patches = x[:, prefix:]
    return patches[:, prefix % 2 :: 2], patches[:, (prefix + 1) % 2 :: 2]


def _take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens of x [images, N, C] at index [images, k]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class MergingHooks(BetweenHooks):
    """Merges tokens in every block; of each token is known how many patches it stands for.

    Args:
        amounts: by block, how many tokens go; at most half of the patch tokens that come to it.
        proportional: whether attention counts a token as often as the patches it stands for.
    """

    def __init__(self, layout: Layout, amounts: Sequence[int], *, proportional: bool) -> None:
        super().__init__(layout, range(layout.depth))
        self.amounts, self.proportional = list(amounts), proportional
        # how many patches each token of the forward pass that runs stands for, [images, tokens]; None: one each
        self._sizes: Tensor | None = None
        # in training the same by block, of what came to it: gradient checkpointing asks again
        self._kept: dict[int, Tensor | None] = {}
        self._with_gradient = False  # whether the last forward pass is one of training that has a backward pass

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sizes": None, "_kept": {}, "_with_gradient": False}

    def finish(self, vit: Any) -> None:
        super().finish(vit)
        self.end_step(0)

    def patches_left(self) -> list[tuple[int, int]]:
        return list(enumerate(merged_counts(self.layout.patches, self.amounts)))

    def end_step(self, step: int) -> None:
        super().end_step(step)
        self._kept = {}

    def begin(self, x: Tensor, *, training: bool) -> None:
        super().begin(x, training=training)
        self._sizes = None
        # grad is off where reentrant checkpointing runs the first time, and what comes to it requires a gradient
        self._with_gradient = training and (torch.is_grad_enabled() or x.requires_grad)

    def run_again(self, *, training: bool) -> None:
        super().run_again(training=training)
        if training:  # the sizes of the passes before are gone
            self.passes.check_last("merged tokens")

    def bias(self, number: int, x: Tensor, *, training: bool) -> Tensor | None:
        if not is_recomputed() and self._with_gradient:
            self._kept[number] = self._sizes
        sizes = self._incoming(number)
        return sizes.log()[:, None, None, :].to(x.dtype) if self.proportional and sizes is not None else None

    def reduce(
        self, number: int, x: Tensor, queries: Tensor, keys: Tensor, gate: Tensor | None, *, training: bool
    ) -> Tensor:
        amount, prefix, sizes = self.amounts[number], self.layout.prefix, self._incoming(number)
        if amount:
            if sizes is None:
                sizes = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
            matching = match_tokens(mean_of_heads(keys.detach(), gate), prefix, amount)
            x, sizes = merge_tokens(x, sizes, matching, prefix)
        if not is_recomputed():
            self._sizes = None if number == len(self.places) - 1 else sizes
            if training and sizes is not None and amount:
                self._follow(matching, sizes)
        return x

    def _incoming(self, number: int) -> Tensor | None:
        return self._kept[number] if is_recomputed() else self._sizes

    def _follow(self, matching: Matching, sizes: Tensor) -> None:
        """Note where the patch tokens come from; one that stands for several patches is none of them."""
        prefix = self.layout.prefix
        if self.survivors is None:
            origin = torch.arange(self.layout.patches, device=sizes.device).expand(len(sizes), -1)
        else:
            origin = self.survivors.origin
        weight = (sizes[:, prefix:] == 1).float()
        self.survivors = Survivors(follow_places(origin, matching, prefix), weight)
