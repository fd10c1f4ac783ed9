"""What a pruning event will need, said before it starts and not by the kernel hours later."""

from collections.abc import Mapping
from pathlib import Path

import torch

_GIB = 2**30


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on the device, or None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [limit for limit in (_meminfo(), _cgroup()) if limit is not None]
    return min(limits, default=None)


def preflight(needed: Mapping[torch.device, int], advice: str = "use a smaller block or fewer targets") -> None:
    """Raise MemoryError, with advice, if a device cannot give the bytes needed."""
    for device, size in needed.items():
        available = available_memory(device)
        if available is not None and size > available:
            raise MemoryError(
                f"second-order pruning needs {size / _GIB:.2f} GiB on {device}, {available / _GIB:.2f} GiB available: "
                f"{advice}"
            )


def _meminfo() -> int | None:
    """MemAvailable of the machine (Linux)."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cgroup() -> int | None:
    """What is left of a container's limit (Linux, cgroup v2); file cache can be dropped and does not count."""
    root = Path("/sys/fs/cgroup")
    limit, current, stat = root / "memory.max", root / "memory.current", root / "memory.stat"
    if not (limit.exists() and current.exists() and stat.exists()) or limit.read_text().strip() == "max":
        return None
    fields = dict(line.split() for line in stat.read_text().splitlines())
    return int(limit.read_text()) - int(current.read_text()) + int(fields.get("inactive_file", 0))
