"""Processes of torch.distributed that train one model: what must be the same in all of them, and what stops them."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ovit_engine.second_order.ranks import Alone, Ranks
from ovit_engine.sharding import gathered

Fact = str | int | bytes  # bytes are digests, which say nothing to a reader


class ApartError(RuntimeError):
    """The processes of a run waited for each other in vain."""


def process_group() -> dist.ProcessGroup | None:
    """The processes that train together, None for a single one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def ranks() -> Alone:
    """What the present process exchanges with the others that train with it."""
    group = process_group()
    return Alone() if group is None else Ranks(group)


def digest(tensor: Tensor) -> bytes:
    """16 bytes that hardly another tensor of this shape and type has; of a boolean one its packed bits are hashed."""
    flat = gathered(tensor).cpu().flatten().clone(memory_format=torch.contiguous_format)
    data = np.packbits(flat.numpy()) if flat.dtype == torch.bool else flat.view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=16).digest()


def agree(everyone: Alone, facts: Mapping[str, Fact], when: str) -> None:
    """Raise RuntimeError on every rank, naming the first of the `facts` that is not the same on all and the ranks.

    All ranks must call it. `when` tells a reader the moment, as "after step 3". ApartError: not all came.
    """
    try:
        found = everyone.gather(dict(facts))
    except RuntimeError as error:  # of torch.distributed: its timeout is over, or a connection broke
        raise ApartError(
            f"the processes did not meet {when}: one of them ended, or is at another step and waits elsewhere (one had "
            "fewer batches, or its gradient scaler alone skipped a step)"
        ) from error
    for name in dict.fromkeys(name for each in found for name in each):
        values = [each.get(name) for each in found]
        if other := [rank for rank, value in enumerate(values) if value != values[0]]:
            raise RuntimeError(
                f"{name} {when} is not the same in all processes: {_spell(other)} {_differ(values, other)}. They train "
                "one model, so the run stops here: give all the same recipe, weights and number of batches"
            )


def _spell(some: Sequence[int]) -> str:
    listed = ", ".join(map(str, some[:8])) + (f" and {len(some) - 8} more" if len(some) > 8 else "")
    return f"rank{'s' * (len(some) > 1)} {listed}"


def _differ(values: Sequence[Fact | None], other: Sequence[int]) -> str:
    verb = "differ" if len(other) > 1 else "differs"
    first, second = values[0], values[other[0]]
    if isinstance(first, bytes) or isinstance(second, bytes):
        return f"{verb} from rank 0"
    return f"{verb} from rank 0 ({second!r}, not {first!r})"
