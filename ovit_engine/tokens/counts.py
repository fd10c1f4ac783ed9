"""How many tokens each method keeps, and where: whole numbers, found once."""

import math
from collections.abc import Sequence

_SLACK = 1e-9  # in binary 100 x 0.29 is 28.999999999999996, and means 29


def floor_counts(patches: int, keep: float, stages: int) -> list[int]:
    """Patch tokens left after each of `stages`: the whole part of patches x keep^s (DynamicViT, arXiv 2106.02034).

    Counted from all patches at once: flooring stage by stage would lose more (156, 124, 99 of 196 for 0.8).

    Raises:
        ValueError: a stage would keep no token.
    """
    counts = [math.floor(patches * keep**stage + _SLACK) for stage in range(1, stages + 1)]
    check_counts(patches, counts)
    return counts


def check_counts(patches: int, counts: Sequence[int]) -> None:
    """Raise ValueError unless `counts` never grow, and are between 1 and `patches`."""
    before = patches
    for count in counts:
        if count < 1:
            raise ValueError(f"{patches} patch tokens would become {list(counts)}: at least one must be kept")
        if count > before:
            raise ValueError(f"{count} tokens can't be kept of {before}: {patches} patch tokens, then {list(counts)}")
        before = count


def quarter_blocks(depth: int) -> list[int]:
    """The blocks before which tokens are dropped unless a recipe says otherwise: a quarter, half, three quarters.

    Of 12 blocks these are 3, 6 and 9, as DynamicViT and EViT have them.
    """
    return sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3)} & set(range(1, depth)))


def ceil_counts(patches: int, shares: Sequence[float], *, fuse: bool) -> list[int]:
    """Return the tokens kept at each stage, where each keeps a share of those that come to it, rounded up.

    With `fuse` each stage that drops any leaves one more token, which comes to the next stage like all others.
    """
    counts = []
    for share in shares:
        counts.append(min(patches, math.ceil(share * patches - _SLACK)))
        patches = after_stage(patches, counts[-1], fuse=fuse)
    return counts


def shares_of(patches: int, counts: Sequence[int], *, fuse: bool) -> list[float]:
    """Return the shares of which `ceil_counts` makes these counts."""
    shares = []
    for keep in counts:
        shares.append(keep / patches)
        patches = after_stage(patches, keep, fuse=fuse)
    return shares


def after_stage(before: int, keep: int, *, fuse: bool) -> int:
    """Return the tokens that leave a stage which keeps `keep` of `before`: a fused one counts."""
    return keep + (fuse and keep < before)


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
