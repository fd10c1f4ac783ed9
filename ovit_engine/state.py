"""States that are saved: a model's, whole, and whether one of the engine is one to go on from."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ovit_engine.recipe import Recipe
from ovit_engine.schedule import Clock
from ovit_engine.targets import clean_name, unwrapped

STATE_VERSION = 1

KEYS = {
    "version",
    "recipe",
    "recipe_hash",
    "finished",
    "step",
    "steps_per_epoch",
    "total_steps",
    "masks",
    "modifiers",
    "history",
}


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model by the names they have without wrappers, whole and on the CPU.

    With FSDP2 every process must call it at the same time.
    """
    tensors = {clean_name(name): tensor.detach() for name, tensor in unwrapped(model).state_dict().items()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).cpu() for name, t in tensors.items()}


def check_state(state: Mapping[str, Any], recipe: Recipe, clock: Clock) -> None:
    """Raise ValueError for half a state, or one of another recipe or length of training; it says what differs."""
    missing = KEYS - set(state)
    if missing:
        raise ValueError(f"the engine state is incomplete: it lacks {', '.join(sorted(missing))}")
    if state["recipe_hash"] != recipe.hash:
        raise ValueError(f"the engine state is of another recipe: {_difference(state['recipe'], recipe.dump())}")
    expected = {
        "version": STATE_VERSION,
        "steps_per_epoch": clock.steps_per_epoch,
        "total_steps": clock.total_steps,
    }
    for key, value in expected.items():
        if state[key] != value:
            raise ValueError(f"the engine state is of another training: its {key} is {state[key]!r}, here {value!r}")


def _difference(theirs: str, ours: str) -> str:
    """The first line in which two dumped recipes differ."""
    for there, here in zip_longest(theirs.splitlines(), ours.splitlines(), fillvalue="nothing"):
        if there != here:
            return f"it has {there.strip()!r} where this one has {here.strip()!r}"
    return "its text was changed"
