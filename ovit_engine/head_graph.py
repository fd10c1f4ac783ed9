"""GOHSP's graph of attention heads: how alike their outputs are, and how often a walk over them visits each.

A walk on the heads of a block goes from one to another (or stays) in proportion to the similarity of their outputs; the
share of time that it spends at a head is that head's importance. The idea is GOHSP's (Yin et al., AAAI 2023); that
similarity is the cosine, and how cosines become non-negative, is our reconstruction
(specs/structured-and-tokens.md §6.2): raw cosines make no Markov chain, since rows may sum to nothing or less.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

Kernel = Literal["shift", "clip", "exp"]

KERNELS: dict[Kernel, Callable[[Tensor, float], Tensor]] = {
    "shift": lambda cosine, temperature: (1 + cosine) / 2,
    "clip": lambda cosine, temperature: cosine.clamp_min(0),
    "exp": lambda cosine, temperature: ((cosine - 1) / temperature).exp(),
}


@torch.no_grad()
def similarities(outputs: Tensor, kernel: Kernel = "shift", temperature: float = 1.0) -> Tensor:
    """Sum over samples of the similarities between heads: float32 [count, count], entries from 0 to the samples.

    A head is as similar to itself as can be, so the diagonal holds the number of samples. Its self-loops make the walk
    settle, also on two heads.

    Args:
        outputs: [samples, count, features], of one block before its projection.
        kernel: from cosine c to similarity: shift (1 + c) / 2, clip max(c, 0), exp e^((c - 1) / temperature).
        temperature: of exp alone; above 0.
    """
    unit = normalize(outputs.float(), dim=-1)
    cosine = (unit @ unit.transpose(-1, -2)).clamp(-1, 1)
    edges = KERNELS[kernel](cosine, temperature)
    edges.diagonal(dim1=-2, dim2=-1).fill_(1)
    return edges.sum(0)


def stationary_distribution(similarity: Tensor) -> Tensor:
    """The share of time that the walk spends at each head, float64 [count], sum 1.

    The walk goes from g to h with probability s_gh / sum_k s_gk. Similarities are symmetric, so it is reversible and
    its distribution is exactly that of the degrees: pi_h ~ sum_k s_hk. No iteration is needed.

    Args:
        similarity: [count, count], symmetric and non-negative with a positive diagonal; its scale does not matter.

    Raises:
        ValueError: it is no such matrix.
    """
    wide = similarity.detach().cpu().double()
    if not bool(wide.isfinite().all()):
        raise ValueError("similarities of heads are not finite: did training diverge?")
    if wide.ndim != 2 or wide.shape[0] != wide.shape[1] or not torch.allclose(wide, wide.T, rtol=1e-4, atol=1e-6):
        raise ValueError(f"similarities of heads must be a symmetric matrix, not {list(similarity.shape)}")
    if not (bool((wide >= 0).all()) and bool((wide.diagonal() > 0).all())):
        raise ValueError("similarities of heads must be non-negative, and that of a head to itself positive")
    degrees = wide.sum(1)
    return degrees / degrees.sum()
