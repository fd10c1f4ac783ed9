"""The machine and the versions that a measurement belongs to."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from ovit_engine.certificate.model import Machine

_INT8_FLAGS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")

_PACKAGES = ("ovit-engine", "torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy")


def this_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    """Model of the CPU and its int8 instructions; on systems without /proc only what Python knows."""
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, separator, value = line.partition(":")
            if separator:
                fields.setdefault(key.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    return Machine(
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        int8=tuple(flag for flag in _INT8_FLAGS if flag in flags),
    )


def may_saturate(machine: Machine) -> bool:
    """Return whether int8 products can overflow on this machine: x86 without VNNI adds pairs in 16 bits."""
    return not machine.int8 and platform.machine() in ("x86_64", "AMD64")


def versions() -> dict[str, str]:
    """Versions of the packages that took part."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a figure needs beside it to be compared with another."""

    machine: Machine
    # physical cores that the process may use
    cores: int
    versions: dict[str, str]
    # processes that wanted a core in the minute before the measurement and in its last; None where the system
    # doesn't say
    load: tuple[float, float] | None
    # when it ended: ISO 8601, UTC
    date: str

    @property
    def load_text(self) -> str:
        """How busy the machine was."""
        if self.load is None:
            return "unknown"
        return f"{self.load[0]:.1f} before, {self.load[1]:.1f} after, on {self.cores} core{'s' * (self.cores > 1)}"


def conditions_now(load_before: float | None) -> Conditions:
    """The conditions at the end of a measurement; `load_before` is what `load_average` said at its beginning."""
    after = load_average()
    return Conditions(
        machine=this_machine(),
        cores=physical_cores(),
        versions=versions(),
        load=None if load_before is None or after is None else (load_before, after),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def load_average() -> float | None:
    """Mean number of processes in the last minute that ran or waited for a core, ours among them."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return None


def physical_cores() -> int:
    """Physical cores that this process may use: by its affinity and by the quota of its container."""
    try:
        allowed: Iterable[int] = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        allowed = range(os.cpu_count() or 1)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    return count_cores(text, set(allowed), _QUOTA.read_text() if _QUOTA.exists() else "max 1")


def count_cores(cpuinfo: str, allowed: set[int], quota: str) -> int:
    """Physical cores of which a hardware thread is in `allowed`, at most as many as a quota "MICROSECONDS PERIOD" pays.

    Where `cpuinfo` (the text of /proc/cpuinfo) does not tell cores from their threads, each thread counts as a core.
    """
    cores: set[tuple[str, str]] = set()
    for block in cpuinfo.split("\n\n"):
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        number = fields.get("processor", "")
        if number.isdecimal() and int(number) in allowed:
            cores.add((fields.get("physical id", "0"), fields.get("core id", f"thread {number}")))
    count = len(cores) or len(allowed)
    spend, _, period = quota.partition(" ")
    if spend.strip().isdecimal() and period.strip().isdecimal():
        count = min(count, max(1, int(spend) // int(period)))
    return max(1, count)
