"""Accelerate's mixed precision, and how to compute without it."""

from collections.abc import Callable
from typing import Any

from torch import nn


def plain_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that `model` had before Accelerate put one on the object that runs in autocast."""
    forward: Callable[..., Any] = vars(model).get("_original_forward", model.forward)
    return forward
