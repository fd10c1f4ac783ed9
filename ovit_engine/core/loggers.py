"""What a run tells while it goes on, to anything that takes numbers: `Engine.log_to`."""

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer

from ovit_engine.masking.masks import Masks

Log = Callable[[dict[str, float], int], Any]  # (values by name, applied optimizer steps)


def learning_rates(optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """The learning rate of each parameter group as the optimizer holds it: "lr", or "lr/0", "lr/1" where several."""
    rates = [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    return {"lr": rates[0]} if len(rates) == 1 else {f"lr/{index}": rate for index, rate in enumerate(rates)}


class RateLogs:
    """Who is told the learning rates, and after how many steps each time."""

    def __init__(self) -> None:
        self._logs: list[tuple[Log, int]] = []

    def add(self, log: Log, every: int) -> None:
        """Tell `log` after each `every` steps. Raises ValueError where that is less than one."""
        if every < 1:
            raise ValueError(f"every must be at least 1 step, not {every!r}")
        self._logs.append((log, every))

    def tell(self, optimizers: Iterable[Optimizer], step: int) -> None:
        """Step number `step`, which counts from 1, was made."""
        for log, every in self._logs:
            if step % every == 0:
                log(learning_rates(optimizers), step)


def sparsities(masks: Masks) -> dict[str, float]:
    """The share of pruned weights: "sparsity" over all masked weights, "sparsity/<name>" of each."""
    if not masks.names():
        return {}
    return {"sparsity": masks.sparsity(), **{f"sparsity/{name}": masks.sparsity(name) for name in masks.names()}}
