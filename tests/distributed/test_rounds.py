"""How torchrun's processes find those that were started with them, in a store full of what earlier ones left."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from ovit_engine.distributed.torchrun import name_round, open_round

LONG = timedelta(seconds=20)


def met(store: Any, count: int, delays: Sequence[float]) -> list[str]:
    """What each of `count` processes gets, each of which comes after its delay."""

    def come(rank: int) -> str:
        time.sleep(delays[rank])
        return name_round(store, rank, count, LONG)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(come, range(count)))


@pytest.mark.parametrize("delays", [(0.0, 0.0, 0.0), (0.1, 0.0, 0.0), (0.0, 0.1, 0.05)])
def test_each_round_has_a_name_of_its_own(delays: Sequence[float]) -> None:
    store = dist.HashStore()
    names = [met(store, 3, delays) for _ in range(3)]
    assert all(len(set(each)) == 1 for each in names)
    assert len({each[0] for each in names}) == 3


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_round_that_one_process_never_came_to(dead: int) -> None:
    """Those that came wait in vain until torchrun ends them; what they left misleads nobody."""
    store = dist.HashStore()

    def vain(rank: int) -> None:
        with pytest.raises(TimeoutError, match="the other processes of this training did not come"):
            name_round(store, rank, 3, timedelta(seconds=0.1))

    others = [threading.Thread(target=vain, args=(rank,)) for rank in range(3) if rank != dead]
    for each in others:
        each.start()
    for each in others:
        each.join()
    (name,) = set(met(store, 3, (0.1, 0.0, 0.0)))
    assert len(set(met(store, 2, (0.1, 0.0)))) == 1  # fewer processes than before
    assert name


def test_jobs_that_share_a_store_do_not_meet() -> None:
    """Their processes come at the same time, those of one rank as well."""
    store = dist.HashStore()

    def come(job: str, rank: int) -> bytes:
        time.sleep(0.05 * (job == "a") * (rank == 0))
        part = open_round(store, job, rank, 2, LONG)
        if rank == 0:
            part.set("who", job)
        found: bytes = part.get("who")
        return found

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(come, "abab", (0, 0, 1, 1)))
    assert found == [b"a", b"b", b"a", b"b"]
