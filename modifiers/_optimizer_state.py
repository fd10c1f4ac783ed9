"""What optimizers remember of single weights, for modifiers that bring weights back."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ovit_engine.targets import Slot


@torch.no_grad()
def forget(optimizers: Iterable[Optimizer], slot: Slot, revived: Tensor) -> None:
    """Zero what optimizers remember of single weights: momentum, exp_avg, exp_avg_sq, max_exp_avg_sq and the like."""
    parameter = slot.tensor
    where = slot.scatter(revived)
    # ZeroRedundancyOptimizer keeps what it remembers in an optimizer inside
    for optimizer in (inner for each in optimizers for inner in (each, getattr(each, "optim", None)) if inner):
        for memory in optimizer.state.get(parameter, {}).values():
            if isinstance(memory, Tensor) and memory.shape == parameter.shape:
                memory.masked_fill_(where.to(memory.device), 0)
