"""The range of a tensor that is worth covering: extremes, percentiles, least squared error. Pure functions.

Every function returns (minimum, maximum): 0-d for a whole tensor, [channels] along `axis`. Zero is in the range that
`choose_qparams` makes of them. Clipping by squared error: Banner et al., 2019, §4, https://arxiv.org/abs/1810.05723;
the search over the range instead of a formula for one distribution: Nagel et al., 2021, §3.1,
https://arxiv.org/abs/2106.08295.
"""

import math

import torch
from torch import Tensor

from ovit_engine.quant.functional import IntegerGrid, choose_qparams

# the search looks at 32 ends on each side; an end below a fifth of the extreme never was the best one of a layer
_FRACTIONS = 32
_SMALLEST = 0.2
_ROUNDS = 2
# 16 bins a level: the error of a bin's own width is 1/256 of the rounding error
_BINS = 4096


def rows(x: Tensor, axis: int | None) -> Tensor:
    """`x` as [1, numel], or [channels, rest] along `axis`."""
    return x.reshape(1, -1) if axis is None else x.transpose(0, axis).flatten(1)


def extremes(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value."""
    low, high = torch.aminmax(x) if axis is None else torch.aminmax(rows(x, axis), dim=1)
    return low, high


def percentile_range(x: Tensor, percentile: float, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest value once `100 - percentile` percent of the values at either end are left out.

    Counts are rounded down: with fewer values than one in that share these are the extremes. So they are, not to be
    hidden, where the tensor holds NaN or infinity.
    """
    least, most = extremes(x, axis)
    values = rows(x, axis)
    # 1e-9: 99.9 % of 1000 is 999 and not 998.9999999999999
    left_out = math.floor(values.shape[1] * (100.0 - percentile) / 100.0 + 1e-9)
    count = min(left_out + 1, values.shape[1])
    high = torch.topk(values, count, dim=1).values[:, -1].view_as(most)
    low = torch.topk(values, count, dim=1, largest=False).values[:, -1].view_as(least)
    finite = torch.isfinite(least) & torch.isfinite(most)
    return torch.where(finite, low, least), torch.where(finite, high, most)


def least_error_range(x: Tensor, grid: IntegerGrid, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the range whose rounding and saturation to `grid` leave the least squared error.

    A whole tensor is searched through its histogram, both ends for themselves on an affine grid; channels value by
    value, both ends by the same factor.
    """
    low, high = extremes(x, axis)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # NaN stays
    fractions = torch.linspace(1.0, _SMALLEST, _FRACTIONS, device=x.device)
    if axis is not None:
        return _search_channels(rows(x, axis), low, high, grid, fractions)
    centres, counts = _histogram(x, low, high)
    if grid.symmetric:
        reach = torch.maximum(-low, high) * fractions
        best = _errors(centres, counts, -reach, reach, grid).argmin()  # the first of equals: the widest
        return -reach[best], reach[best]
    lows, highs = low * fractions, high * fractions
    for _ in range(_ROUNDS):  # one end after the other
        high = highs[_errors(centres, counts, low.expand_as(highs), highs, grid).argmin()]
        low = lows[_errors(centres, counts, lows, high.expand_as(lows), grid).argmin()]
    return low, high


def _search_channels(
    values: Tensor, low: Tensor, high: Tensor, grid: IntegerGrid, fractions: Tensor
) -> tuple[Tensor, Tensor]:
    best, chosen = torch.full_like(low, math.inf), torch.ones_like(low)
    for fraction in fractions:
        scale, zero_point = choose_qparams(low * fraction, high * fraction, grid)
        error = _rounding_error(values, scale[:, None], zero_point[:, None], grid).sum(1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, fraction, chosen)
    return low * chosen, high * chosen


def _histogram(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return (centres, counts) of equal bins over [low, high]."""
    width = ((high - low) / _BINS).clamp(min=torch.finfo(torch.float32).tiny)
    index = ((x.reshape(-1) - low) / width).long().clamp(0, _BINS - 1)
    counts = torch.zeros(_BINS, dtype=torch.int64, device=x.device).scatter_add_(0, index, torch.ones_like(index))
    return low + (torch.arange(_BINS, device=x.device) + 0.5) * width, counts


def _errors(centres: Tensor, counts: Tensor, lows: Tensor, highs: Tensor, grid: IntegerGrid) -> Tensor:
    """Squared error for each candidate range [candidates]."""
    scale, zero_point = choose_qparams(lows, highs, grid)
    error = _rounding_error(centres[None], scale[:, None], zero_point[:, None], grid)
    return error.double() @ counts.double()


def _rounding_error(x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> Tensor:
    levels = (torch.round(x / scale) + zero_point).clamp(grid.low, grid.high)
    return ((levels - zero_point) * scale - x).square()
