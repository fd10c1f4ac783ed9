"""Which tokens the class token attends to, and what becomes of the others. Pure functions.

EViT, arXiv 2202.07800, section 3. Letters: H heads, P prefix tokens, N patch tokens, C width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ovit_engine.tokens.gather import gather_tokens, top_tokens
from ovit_engine.tokens.heads import mean_of_heads
from ovit_engine.tokens.precision import widened, without_autocast

_SLACK = 1e-9  # 10 x 0.7 + 1e-15 means 7


def ceil_counts(patches: int, shares: Sequence[float], *, fuse: bool) -> list[int]:
    """Tokens kept at each stage, where each keeps a share of those that come to it, rounded up.

    With `fuse` each stage that drops any leaves one more token, which comes to the next stage like all others.
    """
    counts = []
    for share in shares:
        counts.append(min(patches, math.ceil(share * patches - _SLACK)))
        patches = after_stage(patches, counts[-1], fuse=fuse)
    return counts


def shares_of(patches: int, counts: Sequence[int], *, fuse: bool) -> list[float]:
    """The shares of which `ceil_counts` makes these counts."""
    shares = []
    for keep in counts:
        shares.append(keep / patches)
        patches = after_stage(patches, keep, fuse=fuse)
    return shares


def after_stage(before: int, keep: int, *, fuse: bool) -> int:
    """Tokens that leave a stage which keeps `keep` of `before`: a fused one counts."""
    return keep + (fuse and keep < before)


def class_attention(queries: Tensor, keys: Tensor, prefix: int, gate: Tensor | None = None) -> Tensor:
    """How much attention each patch token gets [images, N], mean over heads and queries; at least float32.

    Fused kernels never show the map of attention: of it only the rows of a few queries are computed anew, each over all
    P + N keys.

    Args:
        queries: [images, H, queries, C / H], of the class token, and of the distillation token where there is one.
        keys: [images, H, P + N, C / H].
        gate: bool [H], heads that count; all where there is none.
    """
    with without_autocast(queries):
        scores = widened(queries) * queries.shape[-1] ** -0.5 @ widened(keys).transpose(-2, -1)
        return mean_of_heads(scores.softmax(dim=-1)[..., prefix:].mean(dim=2), gate)


def keep_attended(x: Tensor, attention: Tensor, keep: int, prefix: int, *, fuse: bool) -> tuple[Tensor, Tensor]:
    """The `keep` patch tokens that get most attention, behind the prefix, and their places [images, keep].

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
