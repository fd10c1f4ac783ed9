"""What every registered modifier keeps to: registering is testing."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import nn

from ovit_engine import Calibration, Clock, Engine, Modifier, Recipe, RecipeError, register
from ovit_engine.core.registry import modifiers
from ovit_engine.quant.prepare import quantizers
from ovit_engine.structured.gates import gate_input, installed
from ovit_engine.structured.recording import is_recording
from ovit_engine.tokens import TokenHooks, hooks_of
from tests.loops import X, Y, hooks_on, loss_of, mlp, recipe
from tests.tokens.models import RowVit

# options with which each does something to the model of tests/loops.py in ten steps
SETTINGS = {
    "acdc": "{every: 2st, start: 1st, last_sparse: 3st, sparsity: 0.5, targets: [0.weight]}",
    "constant_mask": "{targets: [2.weight]}",
    "magnitude_prune": "{start: 2st, end: 6st, every: 2st, sparsity: {from: 0.2, to: 0.5}, targets: [0.weight]}",
    "ovit_prune": "{start: 4st, sparsity: 0.5, targets: [0.weight], block: 16, gradients: 4, images_per_gradient: 4}",
    "obert_prune": "{start: 4st, sparsity: 0.5, targets: [0.weight], block: 16, gradients: 4, images_per_gradient: 4}",
    "mfac_prune": "{start: 4st, sparsity: 0.5, targets: [0.weight], block: 32, gradients: 4, images_per_gradient: 4}",
    "obd_prune": "{start: 4st, sparsity: 0.5, targets: [0.weight], gradients: 4, images_per_gradient: 4}",
    "grad_weight_prune": "{start: 4st, sparsity: 0.5, targets: [0.weight], gradients: 4, images_per_gradient: 4}",
    "movement_prune": "{start: 3st, end: 7st, every: 2st, sparsity: {from: 0.2, to: 0.5}, targets: [0.weight]}",
    "cyclic_lr": "{max: 0.1, min: 0.01, period: 5st}",
    "distill": "{start: 1st, end: 8st}",
    "quantize": "{start: 4st}",
    "dynamic_vit": "{keep: 0.5, blocks: [1]}",
    "shrink": "{}",
    "svite_tokens": "{keep: 0.75}",
    "gohsp": "{end: 7st, every: 2st, parameter_sparsity: 0.3, rank: {images: 64}}",
    "s2vite": "{head_sparsity: 0.5, unit_sparsity: 0.3, every: 3st, gradients: 2}",
    "structured_prune": "{start: 3st, end: 7st, every: 2st, gradients: 2, parameter_sparsity: {from: 0.2, to: 0.5}}",
    "svite": "{every: 3st, sparsity: 0.5, targets: [0.weight], gradients: 2}",
    "evit": "{keep: 0.5, blocks: [1], start: 2st, end: 6st}",
    "tome": "{r: 2}",
}
NAMES = sorted(modifiers())
ON_VIT = {"dynamic_vit", "evit", "gohsp", "s2vite", "shrink", "structured_prune", "svite_tokens", "tome"}


def model_for(name: str) -> nn.Module:
    if name not in ON_VIT:
        return with_zeros()
    torch.manual_seed(0)
    return RowVit(1)


def with_zeros() -> nn.Sequential:
    """The model of tests/loops.py as a sparse checkpoint might be."""
    model = mlp()
    with torch.no_grad():
        model[2].weight[:, ::2] = 0.0
    return model


def build(name: str) -> Modifier:
    return recipe(f"{name}: {SETTINGS[name]}").modifiers[0]


def started(name: str) -> tuple[nn.Module, torch.optim.Optimizer, Engine, Calibration]:
    model = model_for(name)
    engine = Engine(model, recipe(f"{name}: {SETTINGS[name]}"), steps_per_epoch=10, epochs=1).prepare()
    data = torch.utils.data.TensorDataset(X, Y)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return model, optimizer, engine, Calibration(data, nn.functional.mse_loss)


def step(engine: Engine, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    engine.loss(loss_of(model)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def test_each_has_settings_here() -> None:
    assert sorted(SETTINGS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_that_of_the_file(name: str) -> None:
    kind = modifiers()[name]
    assert kind.name == name
    assert kind.__module__ == f"ovit_engine.modifiers.{name}"
    assert (kind.__doc__ or "").strip()


def options(kind: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    for field_name, field in kind.model_fields.items():
        yield f"{kind.__name__}.{field_name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from options(field.annotation)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_description_and_nothing_unknown_is_taken(name: str) -> None:
    kind = modifiers()[name]
    for option, field in options(kind):
        assert field.description, option
    assert kind.model_config.get("extra") == "forbid"
    with pytest.raises(RecipeError, match=rf"r.yaml:2:\d+: {name} has no option 'zzz'"):
        recipe(f"{name}: {SETTINGS[name][:-1]}, zzz: 1}}".replace("{, ", "{"))


@pytest.mark.parametrize("name", NAMES)
def test_it_survives_the_dump(name: str) -> None:
    before = recipe(f"{name}: {SETTINGS[name]}")
    assert Recipe.parse(before.dump()).modifiers == before.modifiers
    assert type(Recipe.parse(before.dump()).modifiers[0]) is modifiers()[name]


@pytest.mark.parametrize("name", NAMES)
def test_its_timeline_lies_within_training(name: str) -> None:
    clock = Clock(10, 20)
    rows = list(build(name).timeline(clock))
    assert rows
    assert all(0 <= step <= clock.total_steps and quantity and value for step, quantity, value in rows)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_resumes_and_leaves_no_hook(name: str) -> None:
    results = []
    for cut in (None, 2, 4, 7):
        model, optimizer, engine, calibration = started(name)
        engine.attach(optimizer, calibration=calibration)
        for _ in range(10 if cut is None else cut):
            step(engine, model, optimizer)
        if cut is not None:
            file = io.BytesIO()
            torch.save([part.state_dict() for part in (model, optimizer, engine)], file)
            model, optimizer, engine, calibration = started(name)
            states = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            for part, state in zip((model, optimizer, engine), states, strict=True):
                part.load_state_dict(state)  # type: ignore[attr-defined]
            engine.attach(optimizer, calibration=calibration)
            for _ in range(10 - cut):
                step(engine, model, optimizer)
        engine.detach()
        assert engine.finished
        assert hooks_on(optimizer) == 0
        if isinstance(left := hooks_of(model), TokenHooks):  # inference drops tokens too, until it is exported
            left.remove()
        hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        assert set(hooks) <= {gate_input}  # gates stay, as fake quantizers do, and are no hooks of the training
        assert not any(is_recording(site) for site in installed(model))
        results.append(model.state_dict())
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_it_tells_when_it_changes_the_model(name: str) -> None:
    """A sweep keeps a model until one of these steps: a change that is not told would be lost on it."""
    model, optimizer, engine, calibration = started(name)
    changes = set(engine.modifiers[0].changes(engine.run.clock))
    assert changes <= set(range(engine.run.total_steps + 1))

    def now() -> tuple[list[bytes], list[bool]]:
        masks = engine.run.masks
        gates = [site.gate.numpy().tobytes() for site in installed(model)]
        kept = [mask.numpy().tobytes() for part in masks.names() if (mask := masks.get(part)) is not None]
        return kept + gates, [bool(quantizer.enabled) for _, quantizer in quantizers(model)]

    engine.attach(optimizer, calibration=calibration)
    before = now()
    for number in range(1, 11):
        step(engine, model, optimizer)
        assert number in changes or now() == before, number
        before = now()


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_works_on_copies(name: str) -> None:
    shared = recipe(f"{name}: {SETTINGS[name]}")
    before, state = shared.dump(), repr(shared.modifiers[0].__pydantic_private__)
    model = model_for(name)
    engine = Engine(model, shared, steps_per_epoch=10, epochs=1).prepare()
    data = torch.utils.data.TensorDataset(X, Y)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer, calibration=Calibration(data, nn.functional.mse_loss))
    for _ in range(10):
        step(engine, model, optimizer)
    engine.detach()
    assert engine.modifiers[0] is not shared.modifiers[0]
    assert shared.dump() == before
    assert repr(shared.modifiers[0].__pydantic_private__) == state


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="modifier 'cyclic_lr' is registered twice"):

        @register("cyclic_lr")
        class Again(Modifier):
            """A second one."""


def test_a_modifier_made_in_python_needs_no_recipe_file() -> None:
    kind = modifiers()["magnitude_prune"]
    made = kind(targets=["nope"], sparsity=0.5)  # type: ignore[call-arg]
    assert Recipe.parse(Recipe("made", (made,)).dump()).modifiers == (made,)
    with pytest.raises(RecipeError, match=r"^magnitude_prune.targets: target 'nope' matches no parameter"):
        Engine(mlp(), Recipe("made", (made,)), steps_per_epoch=1, epochs=1).prepare()
