"""The process group of `ovit train`, as torchrun starts it and starts it again after a failure."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ovit_engine.distributed.comm import Comm, ProcessLostError, world
from ovit_engine.distributed.launch import launched

_TIMEOUT = timedelta(minutes=30)  # as torch has with each exchange


@contextmanager
def process_group(device: torch.device) -> Iterator[Comm]:
    """Join the processes that torchrun started: over NCCL on GPUs, gloo on CPUs. An existing group is used.

    After an error the group stays: it ends with the process, once the error is reported.

    Raises:
        ConnectionError: another process ended.
    """
    launch = launched()
    if dist.is_initialized() or launch.count < 2:
        yield world()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        if dist.is_torchelastic_launched():
            store = open_round(
                _launch_store(_TIMEOUT), os.environ["TORCHELASTIC_RUN_ID"], launch.rank, launch.count, _TIMEOUT
            )
            dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.count)
        else:
            dist.init_process_group(backend)
        yield world()
    except RuntimeError as error:
        if isinstance(error, (ProcessLostError, dist.DistError)) or _is_of_gloo(error):
            raise ConnectionError("another process of this training ended, or can't be reached") from error
        raise
    dist.destroy_process_group()


def _is_of_gloo(error: RuntimeError) -> bool:
    """Return whether a connection of gloo broke. It has no exception of its own, so only the text shows it."""
    return "gloo" in str(error).lower()


@contextmanager
def first_on_machine(comm: Comm) -> Iterator[None]:
    """Run the body in one process of each machine before the others, as a download that they then find done."""
    is_first = launched().local == 0
    if not is_first:
        comm.barrier()
    yield
    if is_first:
        comm.barrier()


def first_to_fail() -> bool:
    """Return whether this process reports its error: of several that fail, only the first does.

    The others fail soon after, for want of an answer, or in the same way: one message is enough.
    """
    if launched().count < 2:
        return True
    try:
        if dist.is_initialized():
            return bool(dist.distributed_c10d._get_default_store().add("failed", 1) == 1)
        # before there is a group; a number of this machine alone, so two machines may report one error twice
        name, attempt = (os.environ.get(f"TORCHELASTIC_{each}", "0") for each in ("RUN_ID", "RESTART_COUNT"))
        return bool(_launch_store(timedelta(seconds=10)).add(f"ovit/{name}/failed/{attempt}", 1) == 1)
    except (KeyError, ValueError, RuntimeError):  # no store: better reported twice than not at all
        return True


def open_round(store: Any, job: str, rank: int, count: int, timeout: timedelta) -> Any:
    """Return the part of `store` that belongs to the present round of `job`, once all its processes are there.

    Jobs of other names (`--rdzv-id`) share the store of agents that were given one endpoint.
    """
    own = dist.PrefixStore(f"ovit/{job}", store)  # type: ignore[attr-defined]
    return dist.PrefixStore(name_round(own, rank, count, timeout), own)  # type: ignore[attr-defined]


def name_round(store: Any, rank: int, count: int, timeout: timedelta) -> str:
    """Return a name for the present round that all its `count` processes get, and that no earlier round had.

    torchrun keeps one store (a `torch.distributed.Store`) over its restarts, with the addresses of dead processes in
    it, and no variable that it sets is the same on all machines and new in each round: TORCHELASTIC_RESTART_COUNT
    counts the deaths on one machine.

    Raises:
        TimeoutError: not all processes came in time.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("leader", own)
        names = [_wait_for(store, f"{own}/{other}", end) for other in range(1, count)]
        store.set(f"{own}/all", " ".join(names))
        return own
    pause = 0.01
    while True:
        # what the process 0 of an earlier round left does not hold the name that this process has now
        leader = _wait_for(store, "leader", end)
        store.set(f"{leader}/{rank}", own)
        if store.check([f"{leader}/all"]) and own in _wait_for(store, f"{leader}/all", end).split():
            return leader
        pause = _pause(pause, end)


def _wait_for(store: Any, key: str, end: float) -> str:
    pause = 0.01
    while not store.check([key]):  # `get` would wait, and print a stack trace when its time is over
        pause = _pause(pause, end)
    value: bytes = store.get(key)
    return value.decode()


def _pause(seconds: float, end: float) -> float:
    """Wait; return how long to wait the next time."""
    if time.monotonic() > end:
        raise TimeoutError("the other processes of this training did not come")
    time.sleep(seconds)
    return min(2 * seconds, 0.5)


def _launch_store(timeout: timedelta) -> Any:
    """Return the store that torchrun holds for its processes."""
    return dist.TCPStore(  # type: ignore[attr-defined]  # public, though not re-exported by "as"
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timeout,
    )
