"""How the processes that torchrun starts together find each other, and not those that it started before."""

import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist


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
