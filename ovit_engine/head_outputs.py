"""Similarities between the outputs of a block's heads, on calibration images or as training goes by."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ovit_engine.gates import GateSite
from ovit_engine.head_graph import Kernel, similarities
from ovit_engine.processes import process_group


class OutputTally:
    """Sums of similarities of one site's heads, float32 [count, count]; the diagonal counts samples.

    It hangs where the tally of gradients does (gate_scores.py): in training mode the gate shows it what it gates.
    Copies of the model record nothing.
    """

    def __init__(self, site: GateSite, kernel: Kernel, temperature: float) -> None:
        self.sums = torch.zeros(site.count, site.count, device=site.gate.device)
        self._kernel, self._temperature = kernel, temperature

    def __call__(self, gated: Tensor, features: Tensor) -> Tensor:
        """`gated` as it is, once `features` [samples, ..., count x width] are counted."""
        self._add(features)
        return gated

    def watch(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The same as a forward pre-hook of the gated layer, in whichever mode."""
        self._add(args[0])

    def _add(self, features: Tensor) -> None:
        outputs = features.detach().reshape(*features.shape[:-1], len(self.sums), -1).movedim(-2, 1).flatten(2)
        self.sums.add_(similarities(outputs, self._kernel, self._temperature))

    def __reduce__(self) -> Any:
        return type(None), ()


@contextmanager
def watched(sites: Sequence[GateSite], kernel: Kernel, temperature: float) -> Iterator[dict[str, Tensor]]:
    """Inside, sums of similarities by site name grow with each forward pass of the model."""
    tallies = {site.name: OutputTally(site, kernel, temperature) for site in sites}
    handles = [site.linear.register_forward_pre_hook(tallies[site.name].watch) for site in sites]
    try:
        yield {name: tally.sums for name, tally in tallies.items()}
    finally:
        for handle in handles:
            handle.remove()


def add_over_processes(sums: Mapping[str, Tensor]) -> None:
    """Make each of the sums that of all processes, in place: all of them must call it."""
    group = process_group()
    for each in sums.values() if group is not None else ():
        dist.all_reduce(each, group=group)


def mean_similarity(site: GateSite, sums: Tensor) -> Tensor:
    """The mean over samples, of sums [count, count]; ValueError where no sample came."""
    samples = float(sums[0, 0])
    if samples == 0:
        raise ValueError(f"no output of {site.owner_name!r} was seen: is the model called, its attention in use?")
    return sums / samples
