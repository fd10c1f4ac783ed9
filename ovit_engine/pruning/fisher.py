"""The inverse empirical Fisher of a block, H = (damp I + 1/N sum g g^T)^-1, and how survivors move by it.

H is built by block Woodbury steps. With X [k, B] some k gradients of one block

    Z = X H,  S = N I + Z X^T,  L = chol(S),  Y = L^-1 Z,  H <- H - Y^T Y

which is exactly the same H as k rank-1 steps (WoodFisher, arXiv 2004.14340; oViT, arXiv 2210.09223), but it touches H
N/k times instead of N, in matrix products, and it is more accurate at small damping than inverting a float32 Gram
matrix.
"""

import torch
from torch import Tensor

# Gradients taken in one step: beyond 32 rounding grows, below 8 memory traffic does.
RANK = 16


def initial_inverse(count: int, size: int, damp: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H before any gradient, [count, size, size]: the identity over the damping."""
    inverse = torch.zeros(count, size, size, dtype=dtype, device=device)
    inverse.diagonal(dim1=1, dim2=2).fill_(1 / damp)
    return inverse


def absorb(inverse: Tensor, gradients: Tensor, total: int) -> None:
    """Take gradients [blocks, k, B] of `total` in all into the inverse [blocks, B, B], in place.

    A chunk whose float32 arithmetic breaks (overflow, or rounding that left it indefinite) is done in float64.
    """
    factor = _factor(inverse, gradients, total)
    if factor is None:
        exact = _factor(inverse.double(), gradients.double(), total)
        factor = (_sound_factor(inverse.double(), gradients.double(), total) if exact is None else exact).to(inverse)
    inverse.baddbmm_(factor.mT, factor, alpha=-1)


def sound_inverse(inverse: Tensor, lowest: Tensor) -> Tensor:
    """Return the inverse [blocks, B, B] in float64 with no eigenvalue below `lowest` [blocks], its exact lower bound.

    Where the condition of F is beyond float32, small eigenvalues of H drown in the rounding of large ones and come out
    negative; the large ones, which decide what is pruned first, are right.

    Raises FloatingPointError if H is not finite.
    """
    if not bool(inverse.isfinite().all()):
        raise FloatingPointError("the inverse Fisher matrix is not finite: more damping is needed")
    values, vectors = torch.linalg.eigh(inverse.double())
    resolution = values[:, -1:] * torch.finfo(torch.float64).eps * inverse.shape[1]
    values = torch.maximum(values, torch.maximum(lowest.double().unsqueeze(1), resolution))
    return torch.bmm(vectors * values.unsqueeze(1), vectors.mT)


def _factor(inverse: Tensor, gradients: Tensor, total: int) -> Tensor | None:
    """Y [blocks, k, B] of the step, or None if it is not finite."""
    products, small = _products(inverse, gradients, total)
    lower, info = torch.linalg.cholesky_ex(small)
    identity = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    whitening = torch.linalg.solve_triangular(lower, identity, upper=False)
    factor = torch.bmm(whitening.to(inverse.dtype), products)
    is_sound = bool(info.sum() == 0) and bool(lower.sum().isfinite()) and bool(factor.sum().isfinite())
    return factor if is_sound else None


def _sound_factor(inverse: Tensor, gradients: Tensor, total: int) -> Tensor:
    """Y where the stored H has become indefinite.

    Exactly, S has no eigenvalue below N: directions in which it has are rounding and are left out.
    """
    products, small = _products(inverse, gradients, total)
    values, vectors = torch.linalg.eigh(small)
    whitening = vectors.mT * torch.where(values < total / 2, 0, values.abs().rsqrt()).unsqueeze(2)
    return torch.bmm(whitening, products)


def _products(inverse: Tensor, gradients: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Z [blocks, k, B] and S [blocks, k, k], the latter in float64."""
    products = torch.bmm(gradients, inverse)
    small = torch.bmm(products, gradients.mT).double()
    small.diagonal(dim1=1, dim2=2).add_(total)
    return products, small


def joint_change(inverse: Tensor, weights: Tensor, removed: Tensor, lowest: Tensor) -> Tensor:
    """Return what to add to weights [c, B] when `removed` [c, B] (True = goes) become zero; H is [c, B, B].

    A chunk that float32 cannot solve is done in float64; where that fails too the stored H has become indefinite, and
    its eigenvalues are held above `lowest` [c]. Exactly 0 in blocks that lose nothing. Raises FloatingPointError.
    """
    change = _solve(inverse, weights, removed)
    if change is None:
        change = _solve(inverse.double(), weights.double(), removed)
    if change is None:
        change = _solve(sound_inverse(inverse, lowest), weights.double(), removed)
    if change is None:
        raise FloatingPointError("the joint update does not stay finite in float64")
    return change.to(weights.dtype)


def _solve(inverse: Tensor, weights: Tensor, removed: Tensor) -> Tensor | None:
    """Return the change, or None if the system is not positive definite."""
    system = inverse * removed.unsqueeze(1)
    system.mul_(removed.unsqueeze(2))
    system.diagonal(dim1=1, dim2=2).masked_fill_(~removed, 1)
    lower, info = torch.linalg.cholesky_ex(system)
    del system
    solution = torch.cholesky_solve((weights * removed).unsqueeze(2), lower)
    change = torch.bmm(inverse, solution).squeeze(2).neg_()
    return change if bool(info.sum() == 0) and bool(change.isfinite().all()) else None
