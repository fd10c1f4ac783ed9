"""Inputs for the tests of second-order pruning: seeded, small, float64."""

from typing import Any

import torch
from torch import Tensor

from ovit_engine.pruning import prune_tensors


def random_problem(
    *shapes: tuple[int, ...], count: int = 20, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and correlated gradients [count, *shape]."""
    generator = torch.Generator().manual_seed(seed)
    weights, gradients = [], []
    for shape in shapes:
        size = torch.Size(shape).numel()
        weights.append(torch.randn(shape, generator=generator, dtype=dtype))
        mixing = torch.randn(size, size, generator=generator, dtype=dtype) / max(size, 1) ** 0.5
        noise = torch.randn(count, size, generator=generator, dtype=dtype)
        gradients.append((noise + noise @ mixing).reshape(count, *shape))
    return weights, gradients


def prune64(weights: list[Tensor], gradients: list[Tensor] | None, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """`prune_tensors` in float64."""
    return prune_tensors(weights, gradients, dtype=torch.float64, **options)


def zeros(masks: list[Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks)
