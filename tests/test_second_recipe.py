"""What comes after a recipe with gates: another recipe, removal, an optimizer from before it."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import Engine, RecipeError
from ovit_engine.structured.gates import find_sites, install, installed, set_gate
from ovit_engine.structured.shrink_model import harvest, shrink
from tests.modifiers.gated import engine_for, train, vit

HALF = "magnitude_prune: {start: 1st, sparsity: 0.5, targets: ['preset:vit']}"


def gated(units: list[int] | None = None) -> Any:
    """A model as an earlier recipe leaves it: the first head of each block is off, or these units."""
    model = vit()
    install(find_sites(model))
    for site in installed(model):
        if units is None and site.kind == "heads":
            set_gate(site, torch.arange(site.count) > 0)
        elif units is not None and site.kind == "units":
            set_gate(site, ~torch.isin(torch.arange(site.count), torch.tensor(units)))
    return model


def exported(model: nn.Module, engine: Engine, path: Path) -> str:
    train(model, engine, 4).detach()
    return str(engine.export(path / "m.onnx", torch.randn(1, 1, 8, 8)))


@pytest.mark.parametrize(
    "modifier",
    [
        HALF,
        "constant_mask: {targets: [blocks.1.attn.proj.weight]}",
        "svite: {sparsity: 0.5, targets: ['preset:vit'], every: 1st}",
    ],
)
def test_a_pruner_beside_gates_that_are_off_is_refused_before_training(modifier: str) -> None:
    wanted = r"^r.yaml:2:5: \w+: 1 of 4 heads of blocks.\d.attn are off already, .*: shrink\(model\) first"
    with pytest.raises(RecipeError, match=wanted):
        engine_for(gated(), modifier, 4)


@pytest.mark.parametrize(
    "modifier",
    [
        "quantize: {start: 1st}",
        "shrink: {}",
        f"shrink: {{}}\n  - {HALF}",
        "structured_prune: {start: 2st, unit_sparsity: 0.5}",
    ],
)
def test_a_second_recipe_that_can_be_exported_is_taken(modifier: str) -> None:
    engine_for(gated(), modifier, 4)


def test_weights_beside_no_gate_are_pruned_and_exported(tmp_path: Path) -> None:
    model = gated()
    engine = engine_for(model, "magnitude_prune: {start: 1st, sparsity: 0.5, targets: [head.weight]}", 4)
    assert "6 of 8 heads" in exported(model, engine, tmp_path)


def test_units_that_a_pattern_holds_in_their_place_are_no_reason() -> None:
    """Export removes none of them; whole groups of four it would."""
    pattern = "magnitude_prune: {start: 1st, pattern: '2:4', targets: ['re:.*fc2.weight']}"
    for units in ([0, 5, 10], []):
        engine_for(gated(units), pattern)
    with pytest.raises(RecipeError, match=r"4 of 96 units of blocks.0.mlp are off already"):
        engine_for(gated([4, 5, 6, 7]), pattern)


def test_after_shrink_it_is_pruned_as_any_other(tmp_path: Path) -> None:
    model = gated()
    shrink(model)
    assert "6 of 8 heads" in exported(model, engine_for(model, HALF, 4), tmp_path)


# --- removal while an engine is attached


def test_a_model_is_not_cut_under_an_engine() -> None:
    model = vit()
    engine = train(model, engine_for(model, "s2vite: {unit_sparsity: 0.5, every: 1st, end: 3st}", 4), 4)
    for cut in (shrink, harvest):
        with pytest.raises(ValueError, match=r"^an engine is attached to the model: call engine.detach\(\) first"):
            cut(model)
    shrink(copy.deepcopy(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    shrink(torch.load(file, weights_only=False))
    engine.detach()
    assert str(shrink(model)).endswith("96 of 192 units")


def test_an_engine_that_failed_watches_no_more() -> None:
    model = gated()
    engine = engine_for(model, "quantize: {start: 1st}").attach(torch.optim.SGD(model.parameters(), 0.1))
    engine.__exit__(KeyError, KeyError(), None)
    shrink(model)


def test_a_model_that_was_shrunk_already_is_told_so() -> None:
    model = gated()
    shrink(model)
    with pytest.raises(ValueError, match=r"^VisionTransformer was shrunk already, .*: left are 6 of 8 heads"):
        shrink(model)


# --- an optimizer from before


def test_an_optimizer_from_before_the_removal_is_told() -> None:
    model = gated()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shrink(model)
    with pytest.warns(UserWarning, match=r"does not train 'blocks.0.attn.qkv.weight'.*was it made before shrink"):
        engine_for(model, "quantize: {start: 1st}").attach(optimizer)


@pytest.mark.parametrize("way", ["given", "new", "head alone", "with others"])
def test_another_optimizer_is_not(way: str) -> None:
    model = gated()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shrink(model, optimizer=optimizer if way == "given" else None)
    if way != "given":
        optimizer = torch.optim.SGD((model.head if way == "head alone" else model).parameters(), 0.1)
    if way == "with others":
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    engine_for(model, "quantize: {start: 1st}").attach(optimizer)


# --- a state


def test_a_state_without_gates_is_no_state_of_a_gated_model() -> None:
    model, plain = vit(), vit()
    engine = train(model, engine_for(model, "s2vite: {unit_sparsity: 0.5, every: 1st, end: 3st}", 4), 2)
    other = vit()
    resumed = engine_for(other, "s2vite: {unit_sparsity: 0.5, every: 1st, end: 3st}", 4)
    resumed.load_state_dict(engine.state_dict())
    other.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"load the model's state of that step, with its 'blocks.0.mlp.fc2.input_"):
        resumed.attach(torch.optim.SGD(other.parameters(), 0.1))


def test_a_gated_state_is_loaded_into_a_model_that_has_gates() -> None:
    """Both ways that docs/structured.md names."""
    model = vit()
    train(model, engine_for(model, "s2vite: {unit_sparsity: 0.5, every: 1st, end: 3st}", 4), 4).detach()
    state, images = model.state_dict(), torch.randn(2, 1, 8, 8)
    one, two = vit(), vit()
    engine_for(one, "s2vite: {unit_sparsity: 0.5, every: 1st, end: 3st}", 4)
    install(find_sites(two, ["units"]))
    for other in (one, two):
        other.load_state_dict(state)
        assert torch.equal(other.eval()(images), model.eval()(images))
    both = vit()
    install(find_sites(both))
    both.load_state_dict(state)
    assert torch.equal(both.eval()(images), model(images))
