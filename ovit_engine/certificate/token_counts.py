"""How many tokens come to each block of a transformer. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field


class TokenCounts(BaseModel):
    """Tokens of an image, class token and its like included, along the blocks of a transformer in their order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    entering: int = Field(ge=1, description="tokens of an image before any is dropped")
    attention: tuple[int, ...] = Field(min_length=1, description="tokens that the attention of each block sees")
    leaving: int = Field(ge=1, description="tokens that leave the last block")

    @property
    def reduced(self) -> bool:
        """Whether any token is dropped or merged."""
        return {self.entering, *self.attention, self.leaving} != {self.entering}

    def __str__(self) -> str:
        """The counts where they change, e.g. "17 -> 12, 9 before the attention of blocks 1, 2; 7 out of the last"."""
        blocks = [i for i, count in enumerate(self.attention) if count != (self.entering, *self.attention)[i]]
        if not self.reduced:
            return f"{self.entering} in all {len(self.attention)} blocks"
        parts = []
        if blocks:
            counts = ", ".join(str(self.attention[i]) for i in blocks)
            parts.append(f"{counts} before the attention of {_blocks(blocks)}")
        if self.leaving != self.attention[-1]:
            parts.append(f"{self.leaving} out of the last")
        return f"{self.entering} -> {'; '.join(parts)}"


def counts_after(entering: int, depth: int, left: Sequence[tuple[int, int]], *, within: bool) -> TokenCounts:
    """The counts of a transformer `depth` deep where `left` says (block, tokens left by it), blocks rising.

    With `within` tokens go between attention and MLP, so that the attention of that block still sees those before.
    """
    attention, now = [], entering
    after = dict(left)
    for block in range(depth):
        seen = now
        now = after.get(block, now)
        attention.append(seen if within else now)
    return TokenCounts(entering=entering, attention=tuple(attention), leaving=now)


def _blocks(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"block {numbers[0]}"
    if len(numbers) > 3 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"blocks {numbers[0]} to {numbers[-1]}"
    return f"blocks {', '.join(map(str, numbers))}"
