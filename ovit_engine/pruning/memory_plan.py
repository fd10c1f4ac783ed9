"""Which tensors are held together, and how often gradients have to come: an event cut to the memory there is.

Where all tensors fit, gradients come once. Where they do not, tensors are held in groups, and gradients come once for
each. If the sparsity is shared out over tensors of several groups, what each removal costs is found group by group, the
choice is made over all of them, and for the survivors to move the gradients come again (not for the last group, which
is still held). Ranks hold different tensors; they go through their groups in step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from ovit_engine.distributed.comm import Comm
from ovit_engine.pruning import memory as system
from ovit_engine.pruning.fisher import RANK
from ovit_engine.pruning.memory import Memory, balance, into_groups
from ovit_engine.pruning.patterns import NM
from ovit_engine.pruning.problem import Options, Solver


@dataclass(frozen=True)
class Plan:
    """How a pruning event goes."""

    # Round by round, the tensors that each rank holds.
    rounds: list[list[list[int]]]
    # Whether the choice has to wait for all of them.
    is_joint: bool
    # How often gradients come at most.
    passes: int
    # Bytes that this rank would need to hold all of its tensors at once.
    needed: int


def make_plan(
    names: Sequence[str],
    weights: Sequence[Tensor],
    solver_type: type[Solver[Any]],
    options: Options,
    count: int,
    limit: int | None,
    comm: Comm,
    held_besides: int = 0,
) -> Plan:
    """Plan an event on tensors like `weights` (their devices and shapes count) for `limit` bytes on each device.

    Without a limit, for what is available now less `held_besides`. Raises MemoryError where a single tensor does not
    fit, on all ranks.
    """
    with comm.fail_together():
        if limit is not None and limit < 1:
            raise ValueError(f"memory_limit must be positive, is {limit}")
        whole = solver_type.memory([weight.shape for weight in weights], options, count)
        mine = balance(whole.held, comm.count)[comm.rank]
        devices = sorted({weights[index].device for index in mine}, key=str)
    users = comm.sharers(devices)
    with comm.fail_together():
        by_device, needed = [], 0
        for device in devices:
            here = [index for index in mine if weights[index].device == device]
            memory = solver_type.memory([weights[index].shape for index in here], options, count)
            memory = Memory(memory.held, whole.besides + _exchange(weights, comm, options))
            needed += memory.total
            room = limit if limit is not None else _available(device, users[device], held_besides)
            if not solver_type.needs_gradients:  # nothing comes twice, so nothing is gained by groups
                room = None
            limited_by = f"{device} has" if limit is None else "memory_limit is"
            groups = into_groups(memory, room, [names[index] for index in here], limited_by, solver_type.advice)
            by_device.append([[here[place] for place in group] for group in groups])
        groups = [sorted(chain.from_iterable(each)) for each in zip_longest(*by_device, fillvalue=[])]
    rounds = [list(each) for each in zip_longest(*comm.gather(groups), fillvalue=[])]
    is_global = options.scope == "global" and not isinstance(options.pattern, NM) and len(weights) > 1
    is_joint = is_global and (len(rounds) > 1 or comm.count > 1)
    passes = 2 * len(rounds) - 1 if is_joint and solver_type.moves(options) else len(rounds)
    return Plan(rounds, is_joint, passes, needed)


def _exchange(weights: Sequence[Tensor], comm: Comm, options: Options) -> int:
    """Return the bytes of a chunk of sixteen gradients on its way to other ranks."""
    if comm.count == 1:
        return 0
    return 2 * RANK * sum(weight.numel() for weight in weights) * options.dtype.itemsize


def _available(device: torch.device, users: int, held_besides: int) -> int | None:
    available = system.available_memory(device)
    return None if available is None else available // users - held_besides
