"""Builds the simulated accelerator and registers it as torch's device "sim"."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ovit_engine.utils.files import atomic_write

NAME = "sim"
SOURCE = Path(__file__).with_name("device.cpp")


def missing() -> str | None:
    """Why it can't be built here, or None."""
    if sys.platform != "linux":
        return f"the simulated device is built on Linux, not on {sys.platform}"
    return None if shutil.which("g++") else "no g++ to build the simulated device with"


def build() -> Path:
    """The compiled backend, kept in the system's folder for temporary files."""
    root = Path(torch.__file__).parent
    sources = b"".join(file.read_bytes() for file in (SOURCE, SOURCE.with_name("hardware.h")))
    kind = hashlib.sha256(sources + f"{torch.__version__} {root}".encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"ovit_simulated_device_{kind}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "device.so"
            command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", str(SOURCE), "-o", str(made)]
            command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
            command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
            command += [f"-L{root}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"g++ could not build {SOURCE.name}: {done.stderr[-2000:]}")
            atomic_write(library, made.read_bytes())
    return library


class Module(ModuleType):
    """What `torch.sim` answers: one device, whose random state is a CPU generator's inside."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def set_device(device: Any) -> None:
        pass

    @staticmethod
    def device(device: Any) -> AbstractContextManager[None]:
        return nullcontext()

    @staticmethod
    def synchronize(device: Any = None) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        state: Tensor = torch.ops.simulated_device.random_state()
        return state

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        torch.ops.simulated_device.set_random_state(state)

    def get_rng_state_all(self) -> list[Tensor]:
        return [self.get_rng_state()]

    def set_rng_state_all(self, states: list[Tensor]) -> None:
        self.set_rng_state(states[0])

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        torch.ops.simulated_device.seed(seed)


def register() -> torch.device:
    """Make device "sim" known to torch in this process, and return it."""
    torch.ops.load_library(build())
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, Module(NAME))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return torch.device(NAME, 0)
