"""What a run reports while it trains, to anything that takes numbers: `Engine.log_to`."""

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer

from ovit_engine.masking.masks import Masks

Log = Callable[[dict[str, float], int], Any]  # (values by name, applied optimizer steps)


_SPARSITY = "/sparsity"


def sparsity_name(modifier: str) -> str:
    """Return the name under which a modifier logs the sparsity that it made."""
    return f"{modifier}{_SPARSITY}"


def sparsity_by(name: str) -> str | None:
    """Return the modifier whose sparsity was logged under `name`; None where that is another value."""
    return name.removesuffix(_SPARSITY) if name.endswith(_SPARSITY) else None


def learning_rates(optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Return the learning rate of each parameter group: "lr", or "lr/0", "lr/1" if there are several."""
    rates = [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    return {"lr": rates[0]} if len(rates) == 1 else {f"lr/{index}": rate for index, rate in enumerate(rates)}


class RateLogs:
    """Logs that receive the learning rates, each every so many steps."""

    def __init__(self) -> None:
        self._logs: list[tuple[Log, int]] = []

    def add(self, log: Log, every: int) -> None:
        """Call `log` every `every` steps. Raises ValueError if that is less than one."""
        if every < 1:
            raise ValueError(f"every must be at least 1 step, not {every!r}")
        self._logs.append((log, every))

    def report(self, optimizers: Iterable[Optimizer], step: int) -> None:
        """Report the learning rates of step number `step`, which counts from 1."""
        for log, every in self._logs:
            if step % every == 0:
                log(learning_rates(optimizers), step)


def sparsities(masks: Masks) -> dict[str, float]:
    """Return the share of pruned weights: "sparsity" over all masked weights, "sparsity/<name>" of each."""
    if not masks.names():
        return {}
    return {"sparsity": masks.sparsity(), **{f"sparsity/{name}": masks.sparsity(name) for name in masks.names()}}
