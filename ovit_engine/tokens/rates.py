"""Learning rates that are lower while a step is made, and what they were afterwards: no scheduler notices."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class ScaledRates:
    """Scales the learning rates of parameter groups for one step at a time."""

    def __init__(self) -> None:
        self._scaled: list[tuple[dict[str, Any], float, float]] = []  # group, before, written

    def scale(self, groups: Iterable[dict[str, Any]], factor: float) -> None:
        """Multiply the learning rate of each group; those of a step that never came to its end are put back first."""
        self.restore()
        for group in groups:
            before = float(group["lr"])
            _write(group, before * factor)
            self._scaled.append((group, before, float(group["lr"])))

    def restore(self) -> None:
        """Put back what `scale` found, where nobody wrote another rate since."""
        for group, before, written in self._scaled:
            if float(group["lr"]) == written:
                _write(group, before)
        self._scaled = []


def _write(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # a compiled step reads this tensor
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
