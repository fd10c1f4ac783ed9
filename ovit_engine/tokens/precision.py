"""Decisions about tokens in full precision: rounded scores are often equal, and ties break differently elsewhere."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on where `x` is."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # torch 2.11 can't trace `is_autocast_available`


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast lets products on the device of `x` be."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()
