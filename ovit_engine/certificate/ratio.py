"""A measured speed-up with its interval, and whether it stands out from noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Speed = Literal["faster", "slower", "within noise"]

# on a quiet machine one file opened twice differs by up to 2 % (where its memory came to lie); under load by more
SESSION_NOISE = 0.03


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster than the baseline: median over rounds, 95 % interval."""

    median: float
    low: float
    high: float
    # how far the baseline is from itself, set up twice and measured in the same rounds
    noise: float = SESSION_NOISE

    @property
    def verdict(self) -> Speed:
        """ "faster" or "slower" only if the whole interval is further from 1 than the baseline is from itself."""
        if self.low > 1 + self.noise:
            return "faster"
        return "slower" if self.high < 1 / (1 + self.noise) else "within noise"

    def describe(self) -> str:
        """The verdict with the interval."""
        if self.verdict == "within noise":
            itself = f"; the baseline varies by {self.noise:.0%}" if self.noise > SESSION_NOISE else ""
            return f"within noise ({self.low:.2f}-{self.high:.2f}x{itself})"
        if self.verdict == "slower":
            return f"{1 / self.median:.2f}x slower ({1 / self.high:.2f}-{1 / self.low:.2f}x)"
        return f"{self.median:.2f}x faster ({self.low:.2f}-{self.high:.2f}x)"
