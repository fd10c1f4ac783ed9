"""Which connections of a sparse tensor move: the smallest weights go, and as many come back elsewhere.

The step of dynamic sparse training on plain tensors: SET (Mocanu et al. 2018) grows at random, RigL (Evci et al. 2020,
arXiv 1911.11134) where the gradient is large; SViTE (Chen et al. 2021, arXiv 2106.04533, section 3.1) is RigL for
vision transformers.
"""

import math

import torch
from torch import Tensor

from ovit_engine.pruning.allocation import take_lowest
from ovit_engine.pruning.patterns import NM, Pattern
from ovit_engine.utils.random_states import mixed


def rewire(weight: Tensor, mask: Tensor, gain: Tensor, *, pattern: Pattern, fraction: float, name: str) -> Tensor:
    """Return the mask (True = kept) after `fraction` of what is kept has moved; it keeps exactly as much as before.

    Of n kept units ceil(fraction * n) of lowest sum |w| go; as many of highest sum `gain` come among those that are
    not there then, so that one which has just gone may come back. A unit is a weight, or a tile of a block pattern.
    Under N:M the smallest weights of the whole tensor go too, and each group grows as many as it has lost, so that
    fewer move in fewer groups as `fraction` falls. Ties go by position in the pattern's layout, the first first.

    Args:
        weight: of any shape and floating type.
        mask: boolean, of its shape, and following `pattern`.
        gain: what a connection promises, of its shape: |gradient|, or random numbers.
        pattern: what the mask follows before and after.
        fraction: from 0 to 1.
        name: of the weight, for errors.

    Raises:
        FloatingPointError: NaN in weight or gain.
    """
    alive = _units(mask, pattern).any(1).cpu()
    size, promise = (_sums(each, pattern, name, what) for each, what in ((weight.abs(), "weight"), (gain, "gradient")))
    count = math.ceil(fraction * int(alive.sum()))
    (dropped,) = take_lowest([size.masked_fill(~alive, torch.inf)], count)
    kept = alive & ~dropped
    order = promise.neg().masked_fill(kept, torch.inf)
    if isinstance(pattern, NM):
        grown = _lowest_of_each(order.reshape(-1, pattern.group), dropped.reshape(-1, pattern.group).sum(1))
    else:
        (grown,) = take_lowest([order], count)
    units = (kept | grown.flatten()).repeat_interleave(pattern.unit)
    return pattern.from_layout(units, mask.shape).to(mask.device)


def random_scores(shape: torch.Size, name: str, *seeds: int) -> Tensor:
    """Numbers in [0, 1) of this shape on the CPU: the same for one name and seeds in every process, at any time."""
    generator = torch.Generator().manual_seed(mixed(*seeds, *name.encode()))
    return torch.rand(shape, generator=generator, device="cpu")


def _units(tensor: Tensor, pattern: Pattern) -> Tensor:
    return pattern.to_layout(tensor).reshape(-1, pattern.unit)


def _sums(values: Tensor, pattern: Pattern, name: str, what: str) -> Tensor:
    """Return one finite number a unit, on the CPU, where choosing the lowest is deterministic."""
    wide = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    sums = _units(wide, pattern).sum(1).cpu()
    if bool(sums.isnan().any()):
        raise FloatingPointError(f"{name}: a {what} is NaN, so connections can't be compared: did training diverge?")
    return sums.clamp(max=torch.finfo(sums.dtype).max)


def _lowest_of_each(order: Tensor, counts: Tensor) -> Tensor:
    """Return the counts[i] lowest of row i, ties by position."""
    return order.argsort(dim=1, stable=True).argsort(dim=1) < counts.unsqueeze(1)
