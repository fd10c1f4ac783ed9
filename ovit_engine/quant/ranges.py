"""Ranges that several processes watch, each on its share of the batch."""

from collections.abc import Iterable, Sequence

import torch

from ovit_engine.distributed.comm import Comm
from ovit_engine.quant.fake_quantizer import FakeQuantize
from ovit_engine.quant.functional import IntegerGrid, choose_qparams


@torch.no_grad()
def share_ranges(quantizers: Iterable[FakeQuantize], comm: Comm) -> None:
    """Give each of these quantizers the widest range that any process of `comm` has for it.

    From equal ranges before, the smallest of the moving averages is the moving average of the smallest values: after a
    batch in each process the range is the one that a single process would have seen on all of them together. A process
    that has seen nothing does not count. All processes must call it with the same quantizers.
    """
    if comm.count == 1:
        return
    by_grid: dict[IntegerGrid, list[FakeQuantize]] = {}
    for quantizer in quantizers:
        by_grid.setdefault(quantizer.grid, []).append(quantizer)
    for grid, alike in by_grid.items():
        _share_grid(alike, grid, comm)


def _share_grid(quantizers: Sequence[FakeQuantize], grid: IntegerGrid, comm: Comm) -> None:
    """All ranges at once: one by one they would cost a GPU a dozen kernels each, after every step."""
    sizes = [quantizer.minimum.numel() for quantizer in quantizers]
    old = {
        name: torch.cat([getattr(quantizer, name).reshape(-1) for quantizer in quantizers])
        for name in ("minimum", "maximum", "scale", "zero_point")
    }
    seen = torch.cat([q.observed.expand(size) for q, size in zip(quantizers, sizes, strict=True)])
    widest = torch.where(seen, torch.stack((-old["minimum"], old["maximum"])), -torch.inf)
    comm.max(widest)
    low, high = -widest[0], widest[1]
    seen = torch.isfinite(low)
    scale, zero_point = choose_qparams(low, high, grid)
    new = {"minimum": low, "maximum": high, "scale": scale, "zero_point": zero_point}
    for name, values in new.items():
        buffers = [getattr(quantizer, name) for quantizer in quantizers]
        parts = torch.split(torch.where(seen, values, old[name]), sizes)
        torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])
    torch._foreach_copy_([q.observed for q in quantizers], [part[0] for part in torch.split(seen, sizes)])
