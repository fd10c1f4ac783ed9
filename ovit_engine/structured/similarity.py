"""Similarities between the outputs of a block's heads, on calibration images or during training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ovit_engine.structured.gates import GateSite
from ovit_engine.structured.recording import Tally

Kernel = Literal["shift", "clip", "exp"]

KERNELS: dict[Kernel, Callable[[Tensor, float], Tensor]] = {
    "shift": lambda cosine, temperature: (1 + cosine) / 2,
    "clip": lambda cosine, temperature: cosine.clamp_min(0),
    "exp": lambda cosine, temperature: ((cosine - 1) / temperature).exp(),
}


@torch.no_grad()
def similarities(outputs: Tensor, kernel: Kernel = "shift", temperature: float = 1.0) -> Tensor:
    """Return the sum over samples of the similarities between heads: float32 [count, count], entries 0 to samples.

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
    """Return the share of time that the walk spends at each head, float64 [count], sum 1.

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


class OutputTally(Tally):
    """Counts similarities of one site's heads, [count, count]; the diagonal counts samples."""

    def __init__(self, site: GateSite, kernel: Kernel, temperature: float) -> None:
        super().__init__(site, rows=site.count)
        self._kernel, self._temperature = kernel, temperature

    def __call__(self, gated: Tensor, features: Tensor) -> Tensor:
        self._add(features)
        return gated

    def watch(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Do the same as a forward pre-hook of the gated layer, in either mode."""
        self._add(args[0])

    def _add(self, features: Tensor) -> None:
        outputs = features.detach().reshape(*features.shape[:-1], len(self.sums), -1).movedim(-2, 1).flatten(2)
        self.sums.add_(similarities(outputs, self._kernel, self._temperature))


@contextmanager
def watched(sites: Sequence[GateSite], kernel: Kernel, temperature: float) -> Iterator[dict[str, Tensor]]:
    """Yield sums of similarities by site name, to which each forward pass of the model inside adds."""
    tallies = {site.name: OutputTally(site, kernel, temperature) for site in sites}
    handles = [site.linear.register_forward_pre_hook(tallies[site.name].watch) for site in sites]
    try:
        yield {name: tally.sums for name, tally in tallies.items()}
    finally:
        for handle in handles:
            handle.remove()


def mean_similarity(site: GateSite, sums: Tensor) -> Tensor:
    """Return the mean over samples, of sums [count, count]; ValueError where no sample came."""
    samples = float(sums[0, 0])
    if samples == 0:
        raise ValueError(f"no output of {site.owner_name!r} was seen: is the model called, its attention in use?")
    return sums / samples
