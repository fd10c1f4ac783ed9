"""Where the survivors move once a set Q of weights of a block goes: w <- w - H[:, Q] (H[Q, Q])^-1 w[Q].

The group formula of the optimal brain surgeon (oViT, arXiv 2210.09223, eq. 5). It depends on the set only, so the
weights after any prefix of an elimination need not be stored. All blocks of a chunk are solved at once, whatever the
size of their Q: rows and columns outside Q are replaced by those of the identity.
"""

import torch
from torch import Tensor

from ovit_engine.second_order.fisher import sound_inverse


def joint_change(inverse: Tensor, weights: Tensor, removed: Tensor, lowest: Tensor) -> Tensor:
    """What to add to weights [c, B] when `removed` [c, B] (True = goes) become zero; H is [c, B, B].

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
    """The change, or None if the system is not positive definite."""
    system = inverse * removed.unsqueeze(1)
    system.mul_(removed.unsqueeze(2))
    system.diagonal(dim1=1, dim2=2).masked_fill_(~removed, 1)
    lower, info = torch.linalg.cholesky_ex(system)
    del system
    solution = torch.cholesky_solve((weights * removed).unsqueeze(2), lower)
    change = torch.bmm(inverse, solution).squeeze(2).neg_()
    return change if bool(info.sum() == 0) and bool(change.isfinite().all()) else None
