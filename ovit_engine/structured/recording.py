"""Importance of heads and units: per-sample gradients of heads and units, recorded by the loop's own backward passes.

The gradient of a gate is that of the gated features times the features before the gate, summed over all that the gate
switches. So it is known of what is off as well (specs/structured-and-tokens.md §3.3): dL/dg for o' = g o is the sum of
dL/do' o, whatever g is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ovit_engine.distributed.comm import world
from ovit_engine.structured.gates import TALLY, GateSite


@dataclass(frozen=True)
class GateScores:
    """Means over the samples of a window, float32 [count] each.

    With o the features of a head or unit before its gate, o' after it, and sums over its tokens and features:

    - `importance`: |sum dL/do' o|, the size of the gradient of a gate that multiplies it.
    - `growth`: sum |dL/do'|, by which S2ViTE as published revives heads.
    - `salience`: sum |dL/do' o|, where terms do not cancel out.
    """

    importance: Tensor
    growth: Tensor
    salience: Tensor
    samples: int

    @classmethod
    def of(cls, site: GateSite, sums: Tensor) -> "GateScores":
        """Return the means of sums [4, count]; ValueError where the gate got no gradient."""
        samples = int(sums[3, 0])
        if samples == 0:
            raise ValueError(
                f"no finite gradient came to the gate of {site.name!r}: is its layer trained, the model in training "
                "mode, the loss finite?"
            )
        importance, growth, salience = sums[:3] / samples
        return cls(importance, growth, salience, samples)


class Tally(ABC):
    """Sums over the samples of one site, [rows, count], while it hangs on the gated layer in training mode.

    Copies of the model record nothing.
    """

    def __init__(self, site: GateSite, rows: int) -> None:
        self.sums = torch.zeros(rows, site.count, device=site.gate.device)

    @abstractmethod
    def __call__(self, gated: Tensor, features: Tensor) -> Tensor:
        """Return `gated` with its values unchanged, and count it."""

    def __reduce__(self) -> Any:
        return type(None), ()


class GradientTally(Tally):
    """Counts gradients, in the rows of `GateScores`."""

    def __init__(self, site: GateSite) -> None:
        super().__init__(site, rows=4)

    def __call__(self, gated: Tensor, features: Tensor) -> Tensor:
        return _Observe.apply(gated, features.detach(), self.sums)  # type: ignore[no-any-return]


def start_recording(sites: Iterable[GateSite], tally: Callable[[GateSite], Tally] = GradientTally) -> None:
    """Record from here on, in training mode only; earlier sums that were not taken are dropped."""
    for site in sites:
        setattr(site.linear, TALLY, tally(site))


def stop_recording(sites: Iterable[GateSite]) -> None:
    """Stop recording, and drop sums that were not taken."""
    for site in sites:
        site.linear.__dict__.pop(TALLY, None)


def is_recording(site: GateSite) -> bool:
    """Return whether training is recorded."""
    return site.linear.__dict__.get(TALLY) is not None


def take_sums(sites: Sequence[GateSite]) -> dict[str, Tensor]:
    """Return what was recorded since the last call, by site name, summed over all processes: each must call it.

    Sums are what to add up and to save; of gradients (float32 [4, count]) `GateScores.of` makes means.
    """
    own = [site.linear.__dict__[TALLY].sums for site in sites]
    total = world().sum(torch.cat([each.flatten() for each in own]))
    parts = torch.split(total, [each.numel() for each in own])
    for each in own:
        each.zero_()
    return {site.name: part.view_as(each) for site, part, each in zip(sites, parts, own, strict=True)}


def check_sums(site: GateSite, sums: Tensor, tally: Callable[[GateSite], Tally] = GradientTally) -> None:
    """Raise ValueError where saved sums are not of the shape that `take_sums` gives for a site."""
    shape = list(tally(site).sums.shape)
    if list(sums.shape) != shape:
        raise ValueError(f"the recorded scores of {site.name!r} must be of shape {shape}, not {list(sums.shape)}")


@torch.library.custom_op("ovit_engine::tally_gate", mutates_args=("sums",))
def _tally_gate(features: Tensor, gradient: Tensor, sums: Tensor) -> None:
    """Add the samples of one backward pass to `sums`. An operator of its own, which a compiled backward calls.

    A gradient scaler multiplies all gradients by a power of two, which changes no order. Where that overflowed nothing
    is added.
    """
    shape = (len(features), -1, sums.shape[1], features.shape[-1] // sums.shape[1])
    gradient = gradient.detach().float().reshape(shape)
    products = gradient * features.detach().float().reshape(shape)
    new = torch.stack((products.sum((1, 3)).abs(), gradient.abs().sum((1, 3)), products.abs().sum((1, 3)))).sum(1)
    new = torch.cat((new, torch.full_like(new[:1], len(features))))
    sums.add_(torch.where(torch.isfinite(new).all(), new, torch.zeros_like(new)))


@_tally_gate.register_fake
def _tally_gate_in_shape(features: Tensor, gradient: Tensor, sums: Tensor) -> None:
    return None


class _Observe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gated: Tensor, features: Tensor, sums: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        ctx.sums = sums
        return gated.view_as(gated)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (features,) = ctx.saved_tensors
        _tally_gate(features, gradient, ctx.sums)
        return gradient, None, None
