"""Greedy elimination inside every Fisher block: which weight goes first, which next, and what each costs.

oViT (arXiv 2210.09223, Algorithm 1) is Cholesky with diagonal pivoting of H = F^-1 by the rule min w_j^2 / H_jj. With
R the rows of the factor so far, step k takes

    h = H[p, :] - R[:, p]^T R,   r = h / sqrt(h_p),   c = w_p / sqrt(h_p),   w <- w - c r,   diag(H) <- diag(H) - r^2

and costs c^2 / 2. Nothing but the order and the costs is remembered: the weights after any number of steps follow from
the *set* of removed weights (`fisher.joint_change`). Pivots are collected in panels, left-looking; after each panel
H is updated by one matrix product, on the columns that are left. A tile of weights is a pivot with matrices for
numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Pivots collected before H is updated.
PANEL = 32

# Recorded in place of a cost, which is 0 or more.
PRUNED_BEFORE = -1.0

BEYOND_QUOTA = -2.0


@dataclass
class Front:
    """What is left of a chunk of blocks [c, B, B]: m weights in m / unit units."""

    # Remainder of the inverse Fisher before the panel, [c, m, m].
    inverse: Tensor
    # Its diagonal after each step, [c, m]; for units of several weights tiles [c, units, unit, unit].
    diagonal: Tensor
    # Weights after each step, [c, m].
    weights: Tensor
    # What no diagonal entry can be below, [c, m].
    floor: Tensor
    # Position of each unit in its block, [c, units].
    position: Tensor
    # Whether no pivot has been below its floor so far, [c, 1].
    sound: Tensor
    # Added to the score: pruned before -1 (goes first), open 0, closed by N:M largest float, gone inf, [c, units].
    barrier: Tensor


def eliminate(
    inverse: Tensor,
    weights: Tensor,
    alive: Tensor,
    floor: Tensor,
    *,
    unit: int = 1,
    quota: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Order and cost of removing units, blocks side by side; inputs are left as they are.

    Args:
        inverse: H, [c, B, B].
        weights: [c, B], zero where pruned before.
        alive: [c, B / unit], False for units pruned before.
        floor: [c, B], lower bounds 1 / F_jj of the diagonal of H at every step, against rounding.
        unit: weights that go together.
        quota: for N:M, how many weights each group of B / groups weights must still lose, [c, groups].

    Returns:
        order [c, steps], positions of units in their block; cost [c, steps], `PRUNED_BEFORE` for units already gone
        (which come first) and `BEYOND_QUOTA` for steps that a block does not need; sound [c], False where H turned
        out indefinite by rounding (a pivot below its floor, or a cost that is not finite).
    """
    front = _start(inverse, weights, alive, floor, unit)
    steps = front.position.shape[1]
    group = 0
    if quota is not None:
        group = alive.shape[1] // quota.shape[1]
        pruned_before = (~alive.gather(1, front.position)).sum(1)
        steps = int((pruned_before + quota.sum(1)).max())
        quota = quota.clone()
        _close(front, quota, group)
    order = torch.empty(len(weights), steps, dtype=torch.int64, device=weights.device)
    cost = torch.empty(len(weights), steps, dtype=weights.dtype, device=weights.device)
    width = max(1, PANEL // unit)
    for start in range(0, steps, width):
        rows = front.weights.new_empty(len(weights), min(width, steps - start) * unit, front.weights.shape[1])
        for step in range(rows.shape[1] // unit):
            pivot, price = _step(front, rows, step, unit)
            place = front.position.gather(1, pivot)
            order[:, start + step], cost[:, start + step] = place.squeeze(1), price.squeeze(1)
            if quota is not None:
                quota.scatter_add_(1, place // group, -(price >= 0).to(quota))
                _close(front, quota, group)
        if start + width < steps:
            front = _compact(front, rows, unit)
    return order, cost, front.sound.squeeze(1) & cost.isfinite().all(1)


def _start(inverse: Tensor, weights: Tensor, alive: Tensor, floor: Tensor, unit: int) -> Front:
    """Return the front without units pruned before, save those that fill up blocks where others have more left."""
    left = int(alive.sum(1).max())
    position = (~alive).byte().argsort(dim=1, stable=True)[:, :left]
    barrier = alive.gather(1, position).to(weights.dtype) - 1
    columns = _columns(position, unit)
    rest = inverse.clone() if bool(alive.all()) else _take_submatrix(inverse, columns)
    sound = torch.ones(len(weights), 1, dtype=torch.bool, device=weights.device)
    here = weights.gather(1, columns), floor.gather(1, columns)
    return Front(rest, _diagonal(rest, unit), *here, position, sound, barrier)


def _step(front: Front, rows: Tensor, step: int, unit: int) -> tuple[Tensor, Tensor]:
    """Remove the cheapest unit of each block; returns its place in the front [c, 1] and its price [c, 1]."""
    before, now = step * unit, (step + 1) * unit
    pivot = (_scores(front, unit) + front.barrier).argmin(1, keepdim=True)
    columns = _columns(pivot, unit)
    row = _take_rows(front.inverse, columns)
    if step:
        seen = rows[:, :before]
        entries = seen.gather(2, columns.unsqueeze(1).expand(-1, before, -1))
        row = torch.baddbmm(row, entries.mT, seen, alpha=-1)
    row, change = _pivot(front, pivot, columns, row, unit)
    rows[:, before:now] = row
    _downdate(front, row, change, unit)
    price = (change * change).sum(1, keepdim=True) / 2
    barrier = front.barrier.gather(1, pivot)
    price = torch.where(barrier == 0, price, torch.where(barrier < 0, PRUNED_BEFORE, BEYOND_QUOTA))
    _bar(front, pivot, unit)
    return pivot, price


def _scores(front: Front, unit: int) -> Tensor:
    """Twice the cost of removing each unit next, [c, units]."""
    if unit == 1:
        return front.weights * front.weights / torch.maximum(front.diagonal, front.floor)
    tiles = front.weights.reshape(*front.barrier.shape, unit, 1)
    whitened: Tensor = torch.linalg.solve_triangular(lower_factors(front.diagonal, front.floor), tiles, upper=False)
    return (whitened * whitened).sum((2, 3))


def _pivot(front: Front, pivot: Tensor, columns: Tensor, row: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Return new rows of the factor [c, unit, m] and their change of the weights [c, unit]."""
    change = front.weights.gather(1, columns)
    floor = front.floor.gather(1, columns)
    if unit == 1:
        diagonal = front.diagonal.gather(1, pivot)
        front.sound &= diagonal >= floor
        root = torch.maximum(diagonal, floor).rsqrt()
        return row * root.unsqueeze(2), change * root
    tile = front.diagonal.gather(1, pivot[:, :, None, None].expand(-1, -1, unit, unit))
    front.sound &= (torch.linalg.cholesky_ex(tile).info == 0).all(1, keepdim=True)
    lower = lower_factors(tile, floor).squeeze(1)
    both = torch.linalg.solve_triangular(lower, torch.cat([row, change.unsqueeze(2)], 2), upper=False)
    return both[:, :, :-1], both[:, :, -1]


def lower_factors(tiles: Tensor, floor: Tensor) -> Tensor:
    """Cholesky factors of tiles [c, n, unit, unit]; where rounding left one indefinite, its lower bound is added."""
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(tiles)
    boost = torch.diag_embed(floor.reshape(tiles.shape[:3]))
    while bool(info.any()) and bool(boost.isfinite().all()):
        lower, info = torch.linalg.cholesky_ex(tiles + (info > 0)[..., None, None] * boost)
        boost = boost * 10
    return lower


def _downdate(front: Front, row: Tensor, change: Tensor, unit: int) -> None:
    """Take the new rows off the weights and the diagonal, in place."""
    if unit == 1:
        only = row.squeeze(1)
        front.weights.addcmul_(change, only, value=-1)
        front.diagonal.addcmul_(only, only, value=-1)
        return
    front.weights.sub_(torch.bmm(change.unsqueeze(1), row).squeeze(1))
    tiles = row.reshape(len(row), unit, -1, unit).transpose(1, 2)
    front.diagonal.sub_(tiles.mT @ tiles)


def _bar(front: Front, pivot: Tensor, unit: int) -> None:
    """Bar the pivot from being taken again; its diagonal only has to stay harmless."""
    front.barrier.scatter_(1, pivot, torch.inf)
    if unit == 1:
        front.diagonal.scatter_(1, pivot, 1.0)
    else:
        identity = torch.eye(unit, dtype=front.diagonal.dtype, device=pivot.device).expand(len(pivot), 1, -1, -1)
        front.diagonal.scatter_(1, pivot[:, :, None, None].expand(-1, -1, unit, unit), identity)


def _close(front: Front, quota: Tensor, group: int) -> None:
    """Bar open weights of groups that have lost enough: before those that are gone, after everything else."""
    full = quota.gather(1, front.position // group) <= 0
    largest = torch.finfo(front.barrier.dtype).max
    front.barrier.masked_fill_(full & (front.barrier == 0), largest)


def _compact(front: Front, rows: Tensor, unit: int) -> Front:
    """Return the front without the units of this panel, H brought up to date."""
    left = front.barrier.shape[1] - rows.shape[1] // unit
    kept = front.barrier.isposinf().byte().argsort(dim=1, stable=True)[:, :left]
    columns = _columns(kept, unit)
    factor = rows.gather(2, columns.unsqueeze(1).expand(-1, rows.shape[1], -1))
    rest = _take_submatrix(front.inverse, columns).baddbmm_(factor.mT, factor, alpha=-1)
    return Front(
        rest,
        _diagonal(rest, unit),
        front.weights.gather(1, columns),
        front.floor.gather(1, columns),
        front.position.gather(1, kept),
        front.sound,
        front.barrier.gather(1, kept),
    )


def _columns(units: Tensor, unit: int) -> Tensor:
    """Return the weights of units: [c, n] -> [c, n * unit]."""
    if unit == 1:
        return units
    return (units.unsqueeze(2) * unit + torch.arange(unit, device=units.device)).flatten(1)


def _take_submatrix(inverse: Tensor, columns: Tensor) -> Tensor:
    """Return the rows and columns [c, n] of [c, m, m]."""
    return _take_rows(inverse, columns).gather(2, columns.unsqueeze(1).expand(-1, columns.shape[1], -1))


def _take_rows(inverse: Tensor, rows: Tensor) -> Tensor:
    """Return the rows [c, n] of [c, m, m]: whole lines of memory, which `gather` would take number by number."""
    first = torch.arange(len(inverse), device=inverse.device).unsqueeze(1) * inverse.shape[1]
    lines = inverse.flatten(0, 1).index_select(0, (first + rows).flatten())
    return lines.reshape(*rows.shape, inverse.shape[2])


def _diagonal(inverse: Tensor, unit: int) -> Tensor:
    """Return a copy of the diagonal [c, m], or of its tiles [c, units, unit, unit]."""
    if unit == 1:
        return inverse.diagonal(dim1=1, dim2=2).clone()
    return diagonal_tiles(inverse, unit).contiguous()


def diagonal_tiles(inverse: Tensor, unit: int) -> Tensor:
    """Return the tiles [c, units, unit, unit] on the diagonal of matrices [c, m, m]: a view."""
    units = inverse.shape[1] // unit
    tiles = inverse.reshape(len(inverse), units, unit, units, unit)
    return tiles.diagonal(dim1=1, dim2=3).movedim(-1, 1)
