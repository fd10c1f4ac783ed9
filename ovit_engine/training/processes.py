"""The processes that train one model together, as torchrun starts them; without it there is one."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ovit_engine.distributed.comm import ApartError


def open_round(store: Any, job: str, rank: int, count: int, patience: timedelta) -> Any:
    """The part of `store` that belongs to the present round of `job` alone, once all its processes are there.

    Jobs of other names (`--rdzv-id`) share the store of agents that were given one endpoint.
    """
    own = dist.PrefixStore(f"ovit/{job}", store)  # type: ignore[attr-defined]
    return dist.PrefixStore(meet(own, rank, count, patience), own)  # type: ignore[attr-defined]


def meet(store: Any, rank: int, count: int, patience: timedelta) -> str:
    """A name for the present round that all `count` processes of it get, and that no round before had.

    torchrun keeps one store (a `torch.distributed.Store`) over its restarts, in which the addresses of dead processes
    lie, and no variable that it sets is the same on all machines and new in each round: TORCHELASTIC_RESTART_COUNT
    counts the deaths on one machine.

    Raises:
        TimeoutError: not all processes came in time.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    if rank == 0:
        store.set("leader", own)
        names = [_read(store, f"{own}/{other}", end) for other in range(1, count)]
        store.set(f"{own}/all", " ".join(names))
        return own
    pause = 0.01
    while True:
        # what the process 0 of an earlier round left says nothing of the name that this process has now
        leader = _read(store, "leader", end)
        store.set(f"{leader}/{rank}", own)
        if store.check([f"{leader}/all"]) and own in _read(store, f"{leader}/all", end).split():
            return leader
        pause = _pause(pause, end)


def _read(store: Any, key: str, end: float) -> str:
    pause = 0.01
    while not store.check([key]):  # `get` would wait, and leave a stack trace on stderr where it waits in vain
        pause = _pause(pause, end)
    value: bytes = store.get(key)
    return value.decode()


def _pause(seconds: float, end: float) -> float:
    """Wait, and how long to wait the next time."""
    if time.monotonic() > end:
        raise TimeoutError("the other processes of this training did not come")
    time.sleep(seconds)
    return min(2 * seconds, 0.5)


_PATIENCE = timedelta(minutes=30)  # as torch has with each exchange


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among all: `rank` of `count`, and `local` on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes; `tensor` itself is changed."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers of the first: running statistics follow each one's own images."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Let one process of each machine do something before the others, which find it done."""
        if self.count > 1 and self.local > 0:
            dist.barrier()
        yield
        if self.count > 1 and self.local == 0:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        found: list[Any] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(found, value)
        return found

    def agree(self, value: Any, what: str) -> None:
        """Raise ValueError where `value` is not the same in all processes."""
        found = self.gather(value)
        other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
        if other is not None:
            raise ValueError(f"{what} differs: process 0 has {found[0]!r}, process {other} has {found[other]!r}")


ALONE = Processes()


def launched() -> Processes:
    """What torchrun told this process, or ALONE."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count < 2 or "RANK" not in os.environ:
        return ALONE
    return Processes(rank=int(os.environ["RANK"]), count=count, local=int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Be one of torchrun's processes: over NCCL on GPUs, gloo on CPUs. A process group that is there is used.

    Where an error leaves this context, the group stays: it ends with the process, after the error was told.
    """
    if dist.is_initialized():
        local = int(os.environ.get("LOCAL_RANK", 0))
        yield Processes(rank=dist.get_rank(), count=dist.get_world_size(), local=local)
        return
    processes = launched()
    if processes.count < 2:
        yield processes
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        if dist.is_torchelastic_launched():
            job = os.environ["TORCHELASTIC_RUN_ID"]
            present = open_round(_store(_PATIENCE), job, processes.rank, processes.count, _PATIENCE)
            dist.init_process_group(backend, store=present, rank=processes.rank, world_size=processes.count)
        else:
            dist.init_process_group(backend)
        yield processes
    except RuntimeError as error:
        if isinstance(error, (ApartError, dist.DistError)) or "gloo" in str(error).lower():
            raise ConnectionError("another process of this training ended, or can't be reached") from error
        raise
    dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one. Each process of a machine has a GPU of its own.

    Raises:
        ValueError: a device that is not here, or fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no device {name!r}: write auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch finds no GPU here")
    processes = launched()
    if device.type == "cuda" and processes.count > 1:
        gpus = torch.cuda.device_count()
        if processes.local >= gpus:
            raise ValueError(f"{gpus} GPUs for more processes: start {gpus} a machine (--nproc-per-node {gpus})")
        device = torch.device("cuda", processes.local)
        torch.cuda.set_device(device)
    return device


def first_to_fail() -> bool:
    """Whether this process is to tell the error that it met: of several, the one that meets one first.

    The others fail soon after, for want of an answer, or in the same way: one message is enough.
    """
    if launched().count < 2:
        return True
    try:
        if dist.is_initialized():
            return bool(dist.distributed_c10d._get_default_store().add("failed", 1) == 1)
        # before they have met; a number of this machine alone, so two machines may tell one error twice
        name, attempt = (os.environ.get(f"TORCHELASTIC_{each}", "0") for each in ("RUN_ID", "RESTART_COUNT"))
        return bool(_store(timedelta(seconds=10)).add(f"ovit/{name}/failed/{attempt}", 1) == 1)
    except (KeyError, ValueError, RuntimeError):  # no store: better told twice than not at all
        return True


def _store(timeout: timedelta) -> Any:
    """What the processes know each other by, as torchrun holds it."""
    return dist.TCPStore(  # type: ignore[attr-defined]  # public, though not re-exported by "as"
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timeout,
    )
