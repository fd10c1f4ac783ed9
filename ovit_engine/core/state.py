"""Saved states: a whole model's, and the engine's with the checks before training resumes from it."""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import yaml
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor, nn
from typing_extensions import TypedDict

from ovit_engine.core.modifier import Modifier
from ovit_engine.core.recipe import Recipe
from ovit_engine.core.run import Run
from ovit_engine.core.schedule import Clock
from ovit_engine.distributed.sharding import gathered
from ovit_engine.masking.parameters import clean_name, parameter_slots, unwrapped
from ovit_engine.utils.validation import reason

STATE_VERSION = 2  # 1 had no shapes, and no gradients of a window

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)

_SHOWN = 3  # differences that an error names


class EngineState(BaseModel):
    """What `Engine.state_dict` returns, and what a state must have to go on from."""

    model_config = _STRICT

    version: int
    recipe: str
    recipe_hash: str
    finished: bool
    step: NonNegativeInt
    skipped: NonNegativeInt = 0
    steps_per_epoch: int
    total_steps: int
    shapes: Mapping[str, list[int]]
    # checked further by what loads them: masks, modifiers, sweep and teacher
    masks: Mapping[str, Any]
    modifiers: list[Mapping[str, Any]]
    # (step, name, value)
    history: list[list[Any]]
    sweep: Mapping[str, Any] | None
    teacher: Any = None


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model by their names without wrappers, whole and on the CPU.

    With FSDP2 every process must call it at the same time.
    """
    return {clean_name(name): gathered(tensor).cpu() for name, tensor in unwrapped(model).state_dict().items()}


def model_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Return the shape of every parameter by its name: enough to distinguish two models."""
    return {slot.name: list(slot.tensor.shape) for slot in parameter_slots(model)}


def make_state(
    recipe: Recipe, run: Run, modifiers: Sequence[Modifier], *, finished: bool, sweep: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the engine's state."""
    state = EngineState(
        version=STATE_VERSION,
        recipe=recipe.dump(),
        recipe_hash=recipe.hash,
        finished=finished,
        step=run.step,
        skipped=run.skipped,
        steps_per_epoch=run.steps_per_epoch,
        total_steps=run.total_steps,
        shapes=model_shapes(run.model),
        masks=run.masks.state_dict(),
        modifiers=[modifier.state_dict() for modifier in modifiers],
        history=[list(entry) for entry in run.history],
        sweep=sweep,
        teacher=None if run.teacher is None else run.teacher.fingerprint,
    )
    return dict(state)


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
    """Raise ValueError for half a state, or one of another recipe or length of training, with the difference."""
    if not isinstance(state, Mapping):
        raise ValueError(f"the engine state must be what engine.state_dict() gave, not {type(state).__name__}")
    version = state.get("version", STATE_VERSION)
    if version != STATE_VERSION:
        raise ValueError(
            f"the engine state has version {version!r}, this release reads {STATE_VERSION}: go on with the release "
            "that wrote it"
        )
    _check(EngineState, state)
    if state["recipe_hash"] != recipe.hash:
        raise ValueError(f"the engine state is of another recipe: {_recipe_difference(state['recipe'], recipe.dump())}")
    for key, value in (("steps_per_epoch", clock.steps_per_epoch), ("total_steps", clock.total_steps)):
        if state[key] != value:
            raise ValueError(f"the engine state is of another training: its {key} is {state[key]!r}, here {value!r}")


def check_model(state: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ValueError if `model`, after PREPARE, does not have the parameters of the saved model."""
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
    """Raise ValueError if a modifier's saved state lacks a value that its present one has, or has another type."""
    if len(states) != len(modifiers):
        raise ValueError(f"the engine state is of {len(states)} modifiers, the recipe has {len(modifiers)}")
    for number, (saved, modifier) in enumerate(zip(states, modifiers, strict=True)):
        kinds = {key: _type_of(value) for key, value in modifier.state_dict().items()}
        schema = cast(Any, TypedDict)("schema", kinds)
        schema.__pydantic_config__ = _STRICT
        _check(schema, saved, f"modifiers[{number}] ({modifier.name}).")


def _type_of(value: object) -> Any:
    """Return the type that a saved value must have to stand in for `value`."""
    kinds = (bool, int, float, str, list, Tensor, Mapping)
    return next((kind for kind in kinds if isinstance(value, kind)), Any)


def _check(schema: Any, found: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError, in one line, where a saved mapping does not follow a schema."""
    try:
        TypeAdapter(schema).validate_python(found)
    except ValidationError as error:
        errors = error.errors()
    else:
        return
    missing = sorted(prefix + str(each["loc"][0]) for each in errors if each["type"] == "missing")
    if missing:
        raise ValueError(f"the engine state is incomplete: it lacks {', '.join(missing)}")
    where = prefix + ".".join(map(str, errors[0]["loc"]))
    value = " ".join(reprlib.repr(errors[0]["input"]).split())
    raise ValueError(f"the engine state is damaged: {where}: {reason(errors[0])}, not {value}")


def _recipe_difference(theirs: str, ours: str) -> str:
    """Return in which options two dumped recipes differ."""
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
    """Yield (path, value) of each value in nested mappings and lists."""
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
