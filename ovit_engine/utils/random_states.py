"""Python's, NumPy's and torch's random states: seed them, read them, put them back."""

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

RandomState = tuple[Tensor, list[Tensor], Any, Any]


def mixed(*values: int) -> int:
    """Return one seed (63 bits) made of several integers, the same in every process and Python version."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little") >> 1


def random_state() -> RandomState:
    """Return all random states; an accelerator's only if it is in use."""
    accelerator = _accelerator()
    theirs = [] if accelerator is None else accelerator.get_rng_state_all()
    return torch.get_rng_state(), theirs, np.random.get_state(), random.getstate()


def set_random_state(state: RandomState) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state[0])
    accelerator = _accelerator()
    if state[1] and accelerator is not None:
        accelerator.set_rng_state_all(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])


def seed_everything(seed: int) -> None:
    """Seed all random states; an accelerator's only if it is in use."""
    seed_cpu(seed)
    accelerator = _accelerator()
    if accelerator is not None:
        accelerator.manual_seed_all(seed)


def seed_cpu(seed: int) -> None:
    """Seed the random states of the CPU."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _accelerator() -> Any:
    """Return the module of the accelerator (`torch.cuda`, say) if it is in use; more calls would initialize it."""
    device = torch.accelerator.current_accelerator()
    module = None if device is None else torch.get_device_module(device)
    is_initialized = getattr(module, "is_initialized", None)  # torch.mps has none, nor states of all devices
    return module if is_initialized is not None and is_initialized() else None
