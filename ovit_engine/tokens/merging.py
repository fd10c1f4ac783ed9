"""Merging tokens that are alike. Pure functions, written from the paper.

ToMe, arXiv 2210.09461, section 3. Letters: P prefix tokens, N patch tokens, r of them that go; C width. Of all tokens
those in even places make the set A (the class token among them), those in odd places the set B.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ovit_engine.tokens.precision import widened, without_autocast


class Matching(NamedTuple):
    """Which patch tokens of A go into which of B: places among the patch tokens of A and of B, int64."""

    sources: Tensor  # [images, r] in A, the most alike first
    targets: Tensor  # [images, r] in B, one for each source
    rest: Tensor  # [images, |A| - r] in A, those that stay, in their order


def merged_counts(patches: int, amounts: list[int]) -> list[int]:
    """Patch tokens left after each block where `amounts` go: at most half of those there are, so one is always left."""
    counts = []
    for amount in amounts:
        patches -= min(amount, patches // 2)
        counts.append(patches)
    return counts


def falling_amounts(amount: int, depth: int) -> list[int]:
    """From twice `amount` in the first block to none in the last, in a line (section 4.1); `amount` if depth is 1."""
    return [amount] if depth == 1 else [2 * amount * (depth - 1 - place) // (depth - 1) for place in range(depth)]


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
        gone = _taken(even_sizes, matching.sources)
        merged_sizes = odd_sizes + into @ gone
        merged = (odd * odd_sizes + into @ (_taken(even, matching.sources) * gone)) / merged_sizes
    tokens = torch.cat([x[:, :prefix], _taken(even, matching.rest), merged], dim=1)
    left = torch.cat([_taken(even_sizes, matching.rest), merged_sizes], dim=1).squeeze(-1)
    return tokens.to(kind), torch.cat([sizes[:, :prefix], left], dim=1)


def follow_places(origin: Tensor, matching: Matching, prefix: int) -> Tensor:
    """Where the patch tokens that `merge_tokens` gives come from: origin [B, N] of those before; of B where merged."""
    padded = torch.cat([origin.new_zeros(len(origin), prefix), origin], dim=1).unsqueeze(-1)
    even, odd = _halves(padded, prefix)
    return torch.cat([_taken(even, matching.rest), odd], dim=1).squeeze(-1)


def _halves(x: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The patch tokens of x [images, P + N, C] that are in A, and those in B."""
    patches = x[:, prefix:]
    return patches[:, prefix % 2 :: 2], patches[:, (prefix + 1) % 2 :: 2]


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of x [images, N, C] at index [images, k]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
