"""The machine and the versions that a measurement belongs to."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from ovit_engine.export.certificate import Machine

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


NO_VNNI = (
    "this CPU shows no VNNI: int8 kernels add pairs of products in 16 bits, which can saturate; "
    "parity was measured here and shows whether it does"
)


def int8_note(machine: Machine) -> str | None:
    """What to tell about int8 on this machine, if anything."""
    if machine.int8 or platform.machine() not in ("x86_64", "AMD64"):
        return None
    return NO_VNNI


def versions() -> dict[str, str]:
    """Versions of the packages that took part."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
