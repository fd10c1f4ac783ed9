"""Processes of torch.distributed that train one model: what must be the same in all of them, and what stops them."""

import hashlib
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ovit_engine.distributed.sharding import gathered

T = TypeVar("T")


class Alone:
    """One process, which does everything; a process group is the subclass."""

    rank = 0
    count = 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the body on every rank; where it raises on one, raise on all: RuntimeError on the others."""
        yield

    def gather(self, value: T) -> list[T]:
        """The small values of all ranks."""
        return [value]

    def collect(self, candidates: dict[int, T]) -> dict[int, T]:
        """On rank 0 the entries of all ranks, elsewhere any."""
        return candidates

    def deliver(
        self,
        chunk: Sequence[Tensor] | None,
        sizes: Sequence[int],
        held: Sequence[Sequence[int]],
        like: Sequence[Tensor],
    ) -> Iterator[Sequence[Tensor]]:
        """Every rank's present chunk, in order of ranks, with the tensors that this rank holds.

        Args:
            chunk: one tensor [k, *shape] for each tensor of `like` that any rank holds, in order; None for no more.
            sizes: k of every rank, 0 for no more.
            held: which tensors each rank holds.
            like: all tensors, for shapes and device.
        """
        if chunk is not None:
            yield chunk

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """A tensor of rank `source`, bit for bit; others give one of the same shape and type."""
        return tensor


class Ranks(Alone):
    """The processes of a group, over gloo or NCCL."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.count = dist.get_world_size(group)

    @contextmanager
    def together(self) -> Iterator[None]:
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:  # also an interrupt: the others must not wait
            failure = error
        told = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(told):
            if text is not None:
                raise RuntimeError(f"rank {rank} failed: {text}")

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found

    def collect(self, candidates: dict[int, T]) -> dict[int, T]:
        found: list[Any] | None = [None] * self.count if self.rank == 0 else None
        plain = {index: each.cpu() if isinstance(each, Tensor) else each for index, each in candidates.items()}
        dist.gather_object(plain, found, group=self._group, group_dst=0)
        return candidates if found is None else dict(chain.from_iterable(each.items() for each in found))

    def deliver(
        self,
        chunk: Sequence[Tensor] | None,
        sizes: Sequence[int],
        held: Sequence[Sequence[int]],
        like: Sequence[Tensor],
    ) -> Iterator[Sequence[Tensor]]:
        mine = [like[index] for index in held[self.rank]]
        numels = [sum(like[index].numel() for index in each) for each in held]
        dtype = torch.float32
        for each in like:
            dtype = torch.promote_types(dtype, each.dtype)
        device = self._device(like[0])
        if chunk is None:
            send = torch.empty(0, dtype=dtype, device=device)
        else:
            by_tensor = dict(zip(sorted(chain.from_iterable(held)), chunk, strict=True))
            parts = [by_tensor[index].reshape(-1) for each in held for index in each]
            send = torch.cat([part.to(device, dtype) for part in parts])
        arrived = torch.empty(sum(sizes) * numels[self.rank], dtype=dtype, device=device)
        splits = [size * numels[self.rank] for size in sizes]
        dist.all_to_all_single(arrived, send, splits, [sizes[self.rank] * numel for numel in numels], group=self._group)
        for size, flat in zip(sizes, torch.split(arrived, splits), strict=True):
            if size and mine:
                tensors = torch.split(flat, [size * weight.numel() for weight in mine])
                yield [t.reshape(size, *w.shape).to(w.device) for t, w in zip(tensors, mine, strict=True)]

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        data = tensor.to(self._device(tensor)).flatten().view(torch.uint8)
        data = data.clone(memory_format=torch.contiguous_format)
        dist.broadcast(data, group=self._group, group_src=source)
        return data.view(tensor.dtype).reshape(tensor.shape).to(tensor.device)

    def _device(self, like: Tensor) -> torch.device:
        """Where the group's backend takes tensors from: NCCL knows GPUs only, gloo is used from main memory."""
        backends = dict(pair.split(":") for pair in str(dist.get_backend_config(self._group)).split(","))
        if backends.get(like.device.type, "gloo") != "gloo":
            return like.device
        return torch.device("cpu" if "cpu" in backends else f"cuda:{torch.cuda.current_device()}")


def same_everywhere(ranks: Alone, facts: Mapping[str, Any]) -> None:
    """Raise ValueError on all ranks, naming the first of the `facts` that is not the same on each."""
    found = ranks.gather(dict(facts))
    for rank, others in enumerate(found):
        for name, value in found[0].items():
            if others.get(name) != value:
                raise ValueError(f"{name} differs between rank 0 and rank {rank}: pruning needs the same on all ranks")


def users_of(ranks: Alone, devices: Collection[torch.device]) -> dict[torch.device, int]:
    """How many ranks share the memory of each of this rank's devices."""
    host = socket.gethostname()
    found = list(chain.from_iterable(ranks.gather([(host, str(device)) for device in devices])))
    return {device: found.count((host, str(device))) for device in devices}


def fingerprint(tensor: Tensor) -> tuple[int, int]:
    """Two sums over the bits of a tensor, of which hardly another one has the same."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.contiguous().flatten().view(kinds[tensor.dtype.itemsize]).long()
    return int(bits.sum()), int((bits * torch.arange(len(bits), device=bits.device)).sum())


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
