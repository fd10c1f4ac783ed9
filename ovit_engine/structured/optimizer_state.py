"""An optimizer that goes on with a smaller model: its groups hold the new parameters, its state is cut as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Cut:
    """One parameter that became smaller along one axis."""

    name: str
    before: nn.Parameter
    after: nn.Parameter
    axis: int
    keep: Tensor  # indices along the axis

    def of(self, value: Tensor) -> Tensor:
        """The part of a tensor of the old parameter's shape that belongs to what is left."""
        return value.index_select(self.axis, self.keep.to(value.device)).contiguous()


def check_optimizer(optimizer: Optimizer, cuts: Sequence[tuple[str, nn.Parameter, int]]) -> None:
    """Raise where an optimizer can't follow: ValueError if it trains none of these parameters, or its state is opaque.

    Args:
        cuts: name, parameter and axis of each that will become smaller.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for _, parameter, _ in cuts):
        raise ValueError("the optimizer holds no parameter that becomes smaller: was it made for a copy of the model?")
    cut = {id(parameter) for _, parameter, _ in cuts}
    if any(id(item) in cut for value in vars(optimizer).values() if isinstance(value, list) for item in value):
        raise ValueError(f"{type(optimizer).__name__} keeps a list of parameters of its own: make a new one")
    for name, parameter, axis in cuts:
        for key, value in optimizer.state.get(parameter, {}).items():
            if not (isinstance(value, Tensor) and _follows(value, parameter, axis) is not None) and not _is_plain(
                value
            ):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} of {name!r} in a form that we can't cut: make a new one"
                )


@torch.no_grad()
def transplant(optimizer: Optimizer, cuts: Sequence[Cut]) -> None:
    """Put the new parameters in place of the old ones, in the same groups and order, with their part of the state."""
    replaced = {id(cut.before): cut.after for cut in cuts}
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(id(parameter), parameter) for parameter in group["params"]]
    for cut in cuts:
        if cut.before in optimizer.state:
            optimizer.state[cut.after] = _cut_state(optimizer.state.pop(cut.before), cut)


def _cut_state(state: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    return {
        key: cut.of(value) if isinstance(value, Tensor) and _follows(value, cut.before, cut.axis) else value
        for key, value in state.items()
    }


def _follows(value: Tensor, parameter: nn.Parameter, axis: int) -> bool | None:
    """Whether a tensor of state has an entry for each along the axis (momenta), or none (counters); None: unclear."""
    if value.numel() == 1:
        return False
    if value.dim() != parameter.dim():
        return None
    if any(size not in (1, whole) for size, whole in zip(value.shape, parameter.shape, strict=True)):
        return None
    return value.shape[axis] == parameter.shape[axis]


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
