"""States that are saved: a model's, whole, and whether one of the engine is one to go on from."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import yaml
from torch import Tensor, nn

from ovit_engine.core.modifier import Modifier
from ovit_engine.core.recipe import Recipe
from ovit_engine.core.run import Run
from ovit_engine.core.schedule import Clock
from ovit_engine.distributed.sharding import gathered
from ovit_engine.masking.parameters import clean_name, parameter_slots, unwrapped

STATE_VERSION = 2  # 1 had no shapes, and no gradients of a window

_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "version": int,
    "recipe": str,
    "recipe_hash": str,
    "finished": bool,
    "step": int,
    "steps_per_epoch": int,
    "total_steps": int,
    "shapes": Mapping,
    "masks": Mapping,
    "modifiers": list,
    "history": list,
    "sweep": (Mapping, type(None)),
}

_SHOWN = 3  # differences that an error names


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model by the names they have without wrappers, whole and on the CPU.

    With FSDP2 every process must call it at the same time.
    """
    return {clean_name(name): gathered(tensor).cpu() for name, tensor in unwrapped(model).state_dict().items()}


def model_shapes(model: nn.Module) -> dict[str, list[int]]:
    """The shape of every parameter by its name: enough to tell one model from another."""
    return {slot.name: list(slot.tensor.shape) for slot in parameter_slots(model)}


def make_state(
    recipe: Recipe, run: Run, modifiers: Sequence[Modifier], *, finished: bool, sweep: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The engine's state; `check_state` knows what belongs to it."""
    return {
        "version": STATE_VERSION,
        "recipe": recipe.dump(),
        "recipe_hash": recipe.hash,
        "finished": finished,
        "step": run.step,
        "skipped": run.skipped,
        "steps_per_epoch": run.steps_per_epoch,
        "total_steps": run.total_steps,
        "shapes": model_shapes(run.model),
        "masks": run.masks.state_dict(),
        "modifiers": [modifier.state_dict() for modifier in modifiers],
        "history": [list(entry) for entry in run.history],
        "sweep": sweep,
        "teacher": None if run.teacher is None else run.teacher.fingerprint,
    }


def restore_state(state: Mapping[str, Any], run: Run, modifiers: Sequence[Modifier]) -> None:
    """Bring `run` and `modifiers`, after PREPARE, to where `make_state` found theirs; `check_state` comes before.

    Raises:
        ValueError: a state of another model, other modifiers or another teacher.
    """
    check_model(state, run.model)
    check_modifiers(state["modifiers"], modifiers)
    if run.teacher is not None and not state["finished"]:
        run.teacher.check(state.get("teacher"))
    run.masks.load_state_dict(state["masks"], run.model)
    for modifier, own in zip(modifiers, state["modifiers"], strict=True):
        modifier.load_state_dict(own)
    run.step, run.skipped = state["step"], state.get("skipped", 0)
    run.history = [(step, name, value) for step, name, value in state["history"]]


def check_state(state: Mapping[str, Any], recipe: Recipe, clock: Clock) -> None:
    """Raise ValueError for half a state, or one of another recipe or length of training; it says what differs."""
    if not isinstance(state, Mapping):
        raise ValueError(f"the engine state must be what engine.state_dict() gave, not {type(state).__name__}")
    version = state.get("version", STATE_VERSION)
    if version != STATE_VERSION:
        raise ValueError(
            f"the engine state has version {version!r}, this release reads {STATE_VERSION}: go on with the release "
            "that wrote it"
        )
    _check_kinds(state, _KINDS, "the engine state", "")
    if state["recipe_hash"] != recipe.hash:
        raise ValueError(f"the engine state is of another recipe: {_recipe_difference(state['recipe'], recipe.dump())}")
    for key, value in (("steps_per_epoch", clock.steps_per_epoch), ("total_steps", clock.total_steps)):
        if state[key] != value:
            raise ValueError(f"the engine state is of another training: its {key} is {state[key]!r}, here {value!r}")
    if state["step"] < 0:
        raise ValueError(f"the engine state's step is {state['step']}, which is before training began")


def check_model(state: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ValueError where `model`, after PREPARE, has not the parameters of the model that was saved."""
    theirs, ours = state["shapes"], model_shapes(model)
    wrong = [f"{name!r} is missing" for name in theirs if name not in ours]
    wrong += [
        f"{name!r} is {ours[name]}, there {theirs[name]}"
        for name in theirs
        if ours.get(name) != theirs[name] and name in ours
    ]
    wrong += [f"{name!r} is new" for name in ours if name not in theirs]
    if wrong:
        raise ValueError(f"the engine state is of another model than {type(model).__name__} here: {_listed(wrong)}")


def check_modifiers(states: Sequence[Any], modifiers: Sequence[Modifier]) -> None:
    """Raise ValueError where a modifier's saved state lacks what its present one has, or has it of another kind."""
    if len(states) != len(modifiers):
        raise ValueError(f"the engine state is of {len(states)} modifiers, the recipe has {len(modifiers)}")
    for number, (saved, modifier) in enumerate(zip(states, modifiers, strict=True)):
        where = f"modifiers[{number}] ({modifier.name})"
        if not isinstance(saved, Mapping):
            raise ValueError(f"the engine state is damaged: {where} must be a mapping, not {type(saved).__name__}")
        kinds = {key: _kind(value) for key, value in modifier.state_dict().items()}
        _check_kinds(saved, kinds, "the engine state", f"{where}.")


def _kind(value: object) -> type | tuple[type, ...]:
    """What a saved value must be an instance of to stand in for `value`."""
    if value is None:
        return object
    for kind in (bool, int, Mapping, Tensor, str):
        if isinstance(value, kind):
            return kind
    return (int, float) if isinstance(value, float) else list if isinstance(value, list) else object


def _check_kinds(
    found: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]], what: str, prefix: str
) -> None:
    missing = sorted(kinds.keys() - found.keys())
    if missing:
        raise ValueError(f"{what} is incomplete: it lacks {', '.join(prefix + key for key in missing)}")
    for key, kind in kinds.items():
        value = found[key]
        # True is an int to Python
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            expected = getattr(kind, "__name__", "mapping or nothing").lower()
            raise ValueError(f"{what} is damaged: {prefix}{key} must be {expected}, not {type(value).__name__}")


def _recipe_difference(theirs: str, ours: str) -> str:
    """In which options two dumped recipes differ."""
    try:
        there, here = dict(_leaves(yaml.safe_load(theirs))), dict(_leaves(yaml.safe_load(ours)))
    except yaml.YAMLError:
        return "its text is damaged"
    names = list(dict.fromkeys([*there, *here]))
    found = [
        f"{name or 'it'} is {_shown(there, name)} there, {_shown(here, name)} here"
        for name in names
        if _shown(there, name) != _shown(here, name)
    ]
    return _listed(found) if found else "its text was changed"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of each value in nested mappings and lists; one of modifiers says its own name."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "nothing"


def _listed(differences: Sequence[str]) -> str:
    more = len(differences) - _SHOWN
    return "; ".join(islice(differences, _SHOWN)) + (f"; and {more} more" if more > 0 else "")
