"""Python's, NumPy's and torch's random states: seed them, read them, put them back."""

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

RandomState = tuple[Tensor, list[Tensor], Any, Any]


def mixed(*values: int) -> int:
    """One seed (63 bits) out of several whole numbers, the same in every process and Python version."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little") >> 1


def random_state() -> RandomState:
    """All random states as they are now; CUDA's only where it is in use, since reading them would start it."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def set_random_state(state: RandomState) -> None:
    """Put back what `random_state` read."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])


def seed_everything(seed: int) -> None:
    """Start all random states from `seed`; CUDA's only where it is in use."""
    seed_cpu(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def seed_cpu(seed: int) -> None:
    """Start the random states of the CPU from `seed`."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
