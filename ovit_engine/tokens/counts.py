"""How many tokens are kept, and where: whole numbers, found once."""

import math
from collections.abc import Sequence

_SLACK = 1e-9  # 100 x 0.29 is 28.999999999999996 in binary, and means 29


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
