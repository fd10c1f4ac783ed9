"""Parameters that become smaller, and an optimizer that follows: its groups hold the new ones, its state is cut too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ovit_engine.masking.parameters import Slot


@dataclass(frozen=True)
class Cut:
    """One parameter that becomes smaller along one axis."""

    slot: Slot
    before: nn.Parameter
    axis: int
    keep: Tensor  # indices along the axis

    def of(self, value: Tensor) -> Tensor:
        """Return the part of a tensor of the old parameter's shape that is kept."""
        return value.index_select(self.axis, self.keep.to(value.device)).contiguous()

    def apply(self) -> None:
        """Put the smaller parameter, with its gradient, in place of the old one."""
        after = nn.Parameter(self.of(self.before.detach()), self.before.requires_grad)
        if self.before.grad is not None:
            after.grad = self.of(self.before.grad)
        setattr(self.slot.module, self.slot.attribute, after)


def check_optimizer(optimizer: Optimizer, cuts: Sequence[Cut]) -> None:
    """Raise ValueError where an optimizer trains none of these parameters, or has a state that can't be cut."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    smaller = {id(cut.before) for cut in cuts}
    if not held & smaller:
        raise ValueError("the optimizer holds no parameter that becomes smaller: was it made for a copy of the model?")
    if any(id(item) in smaller for value in vars(optimizer).values() if isinstance(value, list) for item in value):
        raise ValueError(f"{type(optimizer).__name__} keeps a list of parameters of its own: make a new one")
    for cut in cuts:
        for key, value in optimizer.state.get(cut.before, {}).items():
            if _follows(value, cut) is None:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} of {cut.slot.name!r} in a form that we can't cut: make "
                    "a new one"
                )


@torch.no_grad()
def cut_optimizer(optimizer: Optimizer, cuts: Sequence[Cut]) -> None:
    """Replace parameters that were cut, in the same groups and order, and cut their state."""
    after = {id(cut.before): cut.slot.tensor for cut in cuts}
    for group in optimizer.param_groups:
        group["params"] = [after.get(id(parameter), parameter) for parameter in group["params"]]
    for cut in cuts:
        if cut.before in optimizer.state:
            state = optimizer.state.pop(cut.before)
            optimizer.state[after[id(cut.before)]] = {
                key: cut.of(value) if _follows(value, cut) else value for key, value in state.items()
            }


def _follows(value: Any, cut: Cut) -> bool | None:
    """Return whether a value of state has an entry for each index of the axis (momenta), or not; None: unclear."""
    if not isinstance(value, Tensor):
        return False if value is None or isinstance(value, (bool, int, float, str)) else None
    if value.numel() == 1:
        return False
    whole = cut.before.shape
    if value.dim() != len(whole) or any(size not in (1, full) for size, full in zip(value.shape, whole, strict=True)):
        return None
    return value.shape[cut.axis] == whole[cut.axis]
