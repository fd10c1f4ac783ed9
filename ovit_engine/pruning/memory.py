"""What a pruning step will need, said before it starts and not by the kernel hours later."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes that a method needs beside the weights and one chunk of gradients."""

    # For as long as a tensor's gradients come and its weights are worked on, one entry a tensor.
    held: Sequence[int]
    # From beginning to end, and in the temporaries of one chunk of blocks.
    besides: int

    @property
    def total(self) -> int:
        """With all tensors held at once."""
        return sum(self.held) + self.besides


def format_bytes(size: int) -> str:
    """1.50 GiB, 12 MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{max(1, round(size / 2**20))} MiB"


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be had on the device, or None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [limit for limit in (_meminfo(), _cgroup()) if limit is not None]
    return min(limits, default=None)


def balance(sizes: Sequence[int], bins: int) -> list[list[int]]:
    """Indices of `sizes` shared out over bins so that their sums are nearly alike; the same everywhere, some empty.

    The largest first, each to the bin with least in it, ties by place.
    """
    shared: list[list[int]] = [[] for _ in range(bins)]
    filled = [0] * bins
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        least = filled.index(min(filled))
        shared[least].append(index)
        filled[least] += sizes[index]
    return [sorted(each) for each in shared]


def into_groups(
    memory: Memory, limit: int | None, names: Sequence[str], limited_by: str, advice: str
) -> list[list[int]]:
    """Tensors in few groups of nearly equal size, each of which fits into `limit` bytes (None: one group).

    Raises:
        MemoryError: a tensor that does not fit alone, with its name, what it needs, what limits it, and advice.
    """
    every = list(range(len(memory.held)))
    if limit is None or memory.total <= limit:
        return [every]
    room = limit - memory.besides
    largest = max(every, key=lambda index: memory.held[index])
    if memory.held[largest] > room:
        needed = format_bytes(memory.held[largest] + memory.besides)
        raise MemoryError(
            f"{names[largest]}: second-order pruning needs {needed} for this tensor alone, "
            f"{limited_by} {format_bytes(limit)}: {advice}"
        )
    for bins in range(-(-sum(memory.held) // room), len(every)):
        groups = balance(memory.held, bins)
        if all(sum(memory.held[index] for index in group) <= room for group in groups):
            return groups
    return [[index] for index in every]


def _meminfo() -> int | None:
    """MemAvailable of the machine (Linux)."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cgroup() -> int | None:
    """Return what is left of a container's limit (Linux, cgroup v2); file cache can be dropped and does not count."""
    root = Path("/sys/fs/cgroup")
    limit, current, stat = root / "memory.max", root / "memory.current", root / "memory.stat"
    if not (limit.exists() and current.exists() and stat.exists()) or limit.read_text().strip() == "max":
        return None
    fields = dict(line.split() for line in stat.read_text().splitlines())
    return int(limit.read_text()) - int(current.read_text()) + int(fields.get("inactive_file", 0))
