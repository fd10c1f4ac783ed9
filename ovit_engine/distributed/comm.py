"""What the processes that train one model exchange. Nothing else calls the collectives of torch.distributed."""

import hashlib
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ovit_engine.distributed.sharding import gathered

T = TypeVar("T")

Facts = Callable[[], Mapping[str, object]]  # by name; only called where there is another process to compare with


class ProcessLostError(RuntimeError):
    """Another process ended, or waits at another step."""


class Comm:
    """The processes that train one model: this one is `rank` of `count`.

    This class is a process that trains alone, `GroupComm` one of several. All processes of a group must call the same
    methods in the same order.
    """

    rank = 0
    count = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and messages."""
        return self.rank == 0

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Run the body; where it raises in one process, raise RuntimeError in the others."""
        yield

    def barrier(self) -> None:
        """Wait until all processes are here."""

    def gather(self, value: T) -> list[T]:
        """Return the small values of all processes, by rank."""
        return [value]

    def gather_entries(self, entries: dict[int, T]) -> dict[int, T]:
        """Return the entries of all processes in the main process; in the others any."""
        return entries

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Return the tensor of process `source`, bit for bit; all have one of the same shape and type."""
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up the tensors of all processes, in place."""
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Take the elementwise maximum over all processes, in place."""
        return tensor

    def exchange(
        self,
        chunk: Sequence[Tensor] | None,
        sizes: Sequence[int],
        held: Sequence[Sequence[int]],
        like: Sequence[Tensor],
    ) -> Iterator[Sequence[Tensor]]:
        """Yield the present chunk of each process in turn, cut to the tensors that this process holds.

        Args:
            chunk: one tensor [k, *shape] for each tensor of `like` that any process holds, in order; None at the end.
            sizes: k of every process, 0 at its end.
            held: which tensors each process holds.
            like: all tensors, for shapes and device.
        """
        if chunk is not None:
            yield chunk

    def assert_equal(self, facts: Facts, when: str) -> None:
        """Raise RuntimeError in every process where one of the facts is not the same in all; tensors are hashed.

        Args:
            when: the moment, for the message, as "after step 3".

        Raises:
            ProcessLostError: a process did not come.
        """

    def sharers(self, devices: Collection[torch.device]) -> dict[torch.device, int]:
        """Count the processes that use each of this process's devices."""
        host = socket.gethostname()
        found = list(chain.from_iterable(self.gather([(host, str(device)) for device in devices])))
        return {device: found.count((host, str(device))) for device in devices}


SINGLE_PROCESS = Comm()


class GroupComm(Comm):
    """A process of a group, over gloo or NCCL."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.count = dist.get_world_size(group)

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:  # also an interrupt: the others must not wait
            failure = error
        messages = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise RuntimeError(f"rank {rank} failed: {message}")

    def barrier(self) -> None:
        dist.barrier(group=self._group)

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found

    def gather_entries(self, entries: dict[int, T]) -> dict[int, T]:
        found: list[Any] | None = [None] * self.count if self.rank == 0 else None
        plain = {index: each.cpu() if isinstance(each, Tensor) else each for index, each in entries.items()}
        dist.gather_object(plain, found, group=self._group, group_dst=0)
        return entries if found is None else dict(chain.from_iterable(each.items() for each in found))

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        data = tensor.to(self._device(tensor)).flatten().view(torch.uint8)
        data = data.clone(memory_format=torch.contiguous_format)
        dist.broadcast(data, group=self._group, group_src=source)
        return data.view(tensor.dtype).reshape(tensor.shape).to(tensor.device)

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tensor

    def exchange(
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

    def assert_equal(self, facts: Facts, when: str) -> None:
        own = {name: digest(value) if isinstance(value, Tensor) else value for name, value in facts().items()}
        try:
            found = self.gather(own)
        except RuntimeError as error:  # of torch.distributed: its timeout is over, or a connection broke
            raise ProcessLostError(
                f"the processes lost each other {when}: one ended, or waits at another step (it had fewer batches, or "
                "its gradient scaler alone skipped a step)"
            ) from error
        for name in dict.fromkeys(chain.from_iterable(found)):
            values = [each.get(name) for each in found]
            if other := [rank for rank, value in enumerate(values) if value != values[0]]:
                raise RuntimeError(
                    f"{name} {when} is not the same in all processes: {_describe_ranks(other)} from rank 0"
                    f"{_describe_values(values[0], values[other[0]])}. They train one model: give all the same "
                    "recipe, weights and number of batches"
                )

    def _device(self, like: Tensor) -> torch.device:
        """Return where the group's backend takes tensors from: NCCL knows GPUs only, gloo is used from main memory."""
        backends = dict(pair.split(":") for pair in str(dist.get_backend_config(self._group)).split(","))
        if backends.get(like.device.type, "gloo") != "gloo":
            return like.device
        return torch.device("cpu" if "cpu" in backends else f"cuda:{torch.cuda.current_device()}")


def _describe_ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"ranks {listed} differ" if len(ranks) > 1 else f"rank {listed} differs"


def _describe_values(first: object, other: object) -> str:
    """Return both values; hashes say nothing to a reader."""
    return "" if isinstance(first, bytes) or isinstance(other, bytes) else f" ({other!r}, not {first!r})"


_SINGLE = ContextVar("_SINGLE", default=False)


@contextmanager
def single_process() -> Iterator[None]:
    """Let this process work as if it were the only one: the others know nothing of what it does."""
    token = _SINGLE.set(True)
    try:
        yield
    finally:
        _SINGLE.reset(token)


def world() -> Comm:
    """Return the processes that train together: those of the default group of torch.distributed, if there are any."""
    if _SINGLE.get() or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return SINGLE_PROCESS
    group = dist.group.WORLD
    assert group is not None
    return GroupComm(group)


def digest(tensor: Tensor) -> bytes:
    """Return 16 bytes that identify a tensor among those of its shape and type. Sharded ones are gathered."""
    flat = gathered(tensor).cpu().flatten().clone(memory_format=torch.contiguous_format)
    data = np.packbits(flat.numpy()) if flat.dtype == torch.bool else flat.view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=16).digest()
