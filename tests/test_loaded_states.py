"""States that the loop loads into the model, or into a part of it, while the engine is attached."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovit_engine import Engine
from ovit_engine.masking.parameters import is_attached
from ovit_engine.quant import quantizers
from ovit_engine.structured.gates import installed
from tests.loops import mlp, plain, recipe, zeros
from tests.modifiers.gated import IMAGES, LABELS, engine_for, train, vit
from tests.test_users_loops import INT8, PRUNE, STEPS, attached, engine_of, sgd


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("part", [False, True])
def test_a_state_of_before_pruning_and_rounding(part: bool, assign: bool) -> None:
    """Also of one layer alone, as where a backbone is put back."""
    model, optimizer, _ = attached(PRUNE, INT8)
    plain(model, optimizer)
    early = copy.deepcopy(model.state_dict())
    for _ in range(7):
        plain(model, optimizer)
    if part:
        own = {key.removeprefix("0."): tensor for key, tensor in early.items() if key.startswith("0.")}
        model[0].load_state_dict(own, assign=assign)
    else:
        model.load_state_dict(early, assign=assign)
    assert zeros(model[0]) == 64
    assert all(bool(quantizer.enabled) for _, quantizer in quantizers(model))
    plain(model, optimizer)  # the step after which ranges are frozen
    assert all(bool(quantizer.enabled) and bool(quantizer.observed) for _, quantizer in quantizers(model))


def test_masks_and_phases_are_put_in_force_once_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks lie on all modules, since any may be loaded alone; a wrapper's load is one of the model."""
    model, _, engine = attached(PRUNE, INT8)
    calls = []
    monkeypatch.setattr(engine.run.masks, "project", lambda: calls.append(1))
    for load, state in ((model, model.state_dict()), (model[0], model[0].state_dict())):
        load.load_state_dict(state)
        assert len(calls) == 1
        calls.clear()
    wrapper = nn.ModuleDict({"inside": model})
    wrapper.load_state_dict(wrapper.state_dict())
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="Missing key"):
        model[0].load_state_dict({})
    model.load_state_dict({}, strict=False)
    assert len(calls) == 3
    assert is_attached(model)
    engine._remove_hooks()
    assert not is_attached(model)
    assert not any(part._load_state_dict_post_hooks or part._load_state_dict_pre_hooks for part in model.modules())


@pytest.mark.parametrize("resumed", [False, True])
def test_ranges_of_one_layer_lost_when_they_are_frozen(resumed: bool) -> None:
    lines = [PRUNE, "quantize: {start: 3st, freeze_observers: 5st}"]
    model, optimizer, engine = attached(*lines)
    early = copy.deepcopy(model[0].state_dict())
    for _ in range(6):
        plain(model, optimizer)
    if resumed:
        weights, state, model = model.state_dict(), engine.state_dict(), mlp()
        engine = engine_of(model, *lines)
        engine.load_state_dict(state)
        model.load_state_dict(weights)
        optimizer = sgd(model.parameters())
        engine.attach(optimizer)
    model[0].load_state_dict(early)
    with pytest.raises(RuntimeError, match=r"ranges are frozen at step 6, .* has none of '0.input_quantizer'"):
        plain(model, optimizer)


def test_a_loaded_state_without_ranges_when_they_are_frozen() -> None:
    model, optimizer, engine = attached(PRUNE, "quantize: {start: 3st, freeze_observers: 5st}")
    early = copy.deepcopy(model.state_dict())
    for _ in range(6):
        plain(model, optimizer)
    late = copy.deepcopy(model.state_dict())
    model.load_state_dict(early)  # an evaluation of other weights
    model.load_state_dict(late)
    plain(model, optimizer)
    assert not engine.modifiers[1]._reloaded  # type: ignore[attr-defined]  # flags of quantizers are not read at each step
    assert all(bool(quantizer.enabled) for _, quantizer in quantizers(model))
    model.load_state_dict(early)
    with pytest.raises(RuntimeError, match="quantize: ranges are frozen at step 7, and the state that the loop loaded"):
        plain(model, optimizer)
    with pytest.raises(RuntimeError, match="go back with a new Engine that loads the engine's state of that step"):
        engine.detach()


@pytest.mark.parametrize(
    "line",
    [
        "structured_prune: {start: 3st, gradients: 1, head_sparsity: 0.5, unit_sparsity: 0.25}",
        "gohsp: {end: 4st, every: 1st, head_sparsity: 0.34, unit_sparsity: 0.25, rank: {steps: 1}}",
    ],
)
def test_a_loaded_state_brings_no_head_back(line: str) -> None:
    """Gates are buffers of the model, and a state of before pruning has them all on."""
    model = vit()
    engine = engine_for(model, line)
    optimizer = sgd(model.parameters())
    engine.attach(optimizer)
    early: Any = None
    gates: dict[str, Tensor] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        engine.loss(nn.functional.cross_entropy(model(IMAGES), LABELS)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step == 0:
            early = copy.deepcopy(model.state_dict())
        if step == 6:
            gates = {site.name: site.gate.clone() for site in installed(model)}
            model.load_state_dict(early)
    assert not all(bool(gate.all()) for gate in gates.values())
    assert all(torch.equal(site.gate, gates[site.name]) for site in installed(model))
    engine.detach()


@pytest.mark.parametrize("turned", [False, True])
def test_gates_that_two_modifiers_write_are_those_of_the_later(turned: bool) -> None:
    """Whatever their order in the recipe; also where the state is of between the two."""
    lines = [
        f"structured_prune: {{start: {at}st, gradients: 1, head_sparsity: {share}}}"
        for at, share in ((3, 0.25), (6, 0.5))
    ]
    model = vit()
    engine = Engine(model, recipe(*(lines[::-1] if turned else lines)), steps_per_epoch=10, epochs=1).prepare()
    between: Any = None

    def each(step: int) -> None:
        nonlocal between
        off = 2 * sum(int((~site.gate).sum()) for site in installed(model)) // 4
        assert off == (step >= 3) + (step >= 6)
        if step == 4:
            between = copy.deepcopy(model.state_dict())
        if step in (5, 7):
            model.load_state_dict(between)

    train(model, engine, 10, each=each)
    engine.detach()
    each(10)


@pytest.mark.parametrize(
    "line",
    [
        "structured_prune: {start: 10st, gradients: 4, head_sparsity: 0.33}",
        "gohsp: {end: 10st, every: 1st, head_sparsity: 0.34, unit_sparsity: 0.25, rank: {steps: 1}}",
    ],
)
def test_what_is_pruned_at_detach_is_what_is_exported(line: str, tmp_path: Path) -> None:
    """One step was skipped, so the last pruning is made up for when training ends."""
    model = vit()
    engine = engine_for(model, line)
    train(model, engine, 9)
    with pytest.warns(UserWarning, match="is done now"):
        engine.detach()
    left = {site.name: site.gate.clone() for site in installed(model)}
    assert not all(bool(gate.all()) for gate in left.values())
    (saved,) = engine.state_dict()["modifiers"]
    assert all(torch.equal(saved["gates"][name], gate) for name, gate in left.items())
    images = torch.cat([IMAGES, IMAGES])
    engine.export(tmp_path / "m.onnx", IMAGES[:1], data=[(images, torch.cat([LABELS, LABELS]))])
    early = vit()
    again = engine_for(early, line)
    again.load_state_dict(engine.state_dict())
    with pytest.raises(RuntimeError, match="is not as training left it"):
        again.export(tmp_path / "m.onnx", IMAGES[:1], data=[(images, torch.cat([LABELS, LABELS]))])
