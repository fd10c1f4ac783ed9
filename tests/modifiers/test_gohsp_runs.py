"""GOHSP's hard cut, restarts, and what it refuses."""

import copy
import gc
import logging
import math
import weakref
from typing import Any

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from ovit_engine import Clock, Engine, RecipeError
from ovit_engine.structured.gates import installed
from tests.loops import mlp, recipe
from tests.modifiers.gated import IMAGES, LABELS, batch, gates_of, train, vit
from tests.modifiers.test_gohsp import CALIBRATION, SOFT, logged, phase, started, trained

# --- hard


def gap_at_the_cut(penalty: str) -> tuple[float, float]:
    """||gated - ungated logits|| / ||logits|| at the hard step, and what was left of the norm."""
    model, engine = started(f"end: 60st, every: 4st, {SOFT}, penalty: {penalty}", 62)
    train(model, engine, 59, rate=0.02, calibration=CALIBRATION)
    optimizer = engine.run.optimizers[0]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    before = model(IMAGES).detach()
    optimizer.step()
    assert not all(site.gate.all() for site in installed(model))
    left = max(logged(engine, f"{kind}_residual")[60] for kind in ("heads", "units"))
    return float((model(IMAGES).detach() - before).norm() / before.norm()), left


def test_after_soft_pruning_the_cut_changes_little() -> None:
    """G10."""
    soft, left = gap_at_the_cut("{heads: 2, units: 2, ramp: 1}")
    rough, more = gap_at_the_cut("{heads: 1.0e-6, units: 1.0e-6, ramp: 1}")
    assert left < 0.1 < 0.4 < more
    assert soft < rough / 5


def test_a_cut_that_comes_too_early_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trained(f"end: 2st, {SOFT}", 3, length=3)
    assert "% of the norm of heads is cut at step 2: soft pruning was too short" in caplog.text


def test_what_goes_is_what_was_drawn_and_soft_pruning_is_freed() -> None:
    """G14."""
    model, engine = started(f"end: 6st, every: 2st, {SOFT}", 8)
    states: list[Any] = []
    refs: list[Any] = []

    def each(step: int) -> None:
        states.append(engine.state_dict()["modifiers"][0])
        if step == 5:
            refs.extend(weakref.ref(target) for target in phase(engine)._targets.values())

    train(model, engine, 8, each=each, calibration=CALIBRATION)
    gates = {site.name: site.gate.tolist() for site in installed(model)}
    assert gates == {name: keep.tolist() for name, keep in states[5]["phase"]["plan"].items()}
    gc.collect()
    assert len(refs) == 6
    assert not any(ref() is not None for ref in refs)
    for state in states[6:]:
        assert state["phase"] == {"plan": {}, "targets": {}, "rates": {}, "growth": {}}
    assert set(states[5]["phase"]["targets"]) == {
        f"blocks.{block}.mlp.{part}" for block in range(2) for part in ("fc1.weight", "fc1.bias", "fc2.weight")
    }
    engine.detach()
    assert gates == {site.name: site.gate.tolist() for site in installed(model)}


def test_after_the_cut_nothing_is_drawn() -> None:
    model, engine = trained(f"end: 3st, every: 1st, {SOFT}, penalty: {{heads: 1, units: 1}}", 4, length=6)
    plain = nn.functional.cross_entropy(model(IMAGES), LABELS)
    expected = torch.autograd.grad(plain, list(model.parameters()))
    engine.run.optimizers[0].zero_grad()
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    engine.run.optimizers[0].step()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_an_averaged_copy_follows_at_the_cut() -> None:
    model, engine = started(f"end: 2st, every: 1st, {SOFT}")
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer, calibration=CALIBRATION, ema=ema)
    for step in range(3):
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        ema.update(model)
        assert gates_of(ema.module) == gates_of(model)
    assert any(len(on) < 96 for on in gates_of(model).values())


# --- from here to there


@pytest.mark.parametrize("score", ["graph, steps: 3", "taylor, steps: 3", "graph"])
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_resumed_run_is_the_same_bit_for_bit(score: str, cut: int) -> None:
    """G12: within the window of ranking, and with duals in force."""
    options = f"end: 8st, every: 2st, {SOFT}, rank: {{score: {score}}}"
    calibration = None if "steps" in score else CALIBRATION
    model, engine = started(options)
    whole = train(model, engine, 10, calibration=calibration)
    whole.detach()
    first, half = started(options)
    train(first, half, cut, calibration=calibration)
    states = copy.deepcopy([first.state_dict(), half.state_dict(), half.run.optimizers[0].state_dict()])
    if cut == 5:
        assert any(target[~keep].any() for target, keep in _with_plan(states[1]["modifiers"][0]["phase"]))
    second, rest = started(options)
    rest.load_state_dict(states[1])
    second.load_state_dict(states[0])
    train(second, rest, 10 - cut, first=cut, state=states[2], calibration=calibration).detach()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert engine.run.history == rest.run.history


def _with_plan(state: Any) -> list[tuple[Tensor, Tensor]]:
    return [
        (state["targets"][f"blocks.{block}.mlp.fc1.weight"], state["plan"][f"blocks.{block}.mlp.fc2"])
        for block in range(2)
    ]


def test_half_a_state_is_refused() -> None:
    options = f"end: 8st, every: 2st, {SOFT}"
    model, engine = started(options)
    train(model, engine, 3, calibration=CALIBRATION)
    state = engine.state_dict()
    for change, words in (
        (lambda soft: soft["targets"].pop("blocks.0.mlp.fc1.bias"), "no soft pruning of 'blocks.0.mlp.fc1.bias'"),
        (lambda soft: soft["plan"].update({"head": torch.ones(3)}), r"soft pruning of 'head' \[3\] fits nothing here"),
        (lambda soft: soft["plan"].pop("blocks.1.mlp.fc2"), "no soft pruning of 'blocks.1.mlp.fc2'"),
    ):
        broken = copy.deepcopy(state)
        change(broken["modifiers"][0]["phase"])
        with pytest.raises(ValueError, match=words):
            started(options)[1].load_state_dict(broken)


def test_training_that_ends_early() -> None:
    _, engine = trained(f"end: 9st, {SOFT}", 4, length=10)
    with pytest.raises(RuntimeError, match="gohsp: training ended before hard pruning at step 9"):
        engine.detach()
    model, engine = trained(f"end: 10st, every: 3st, {SOFT}", 9, length=10)
    with pytest.warns(UserWarning, match="hard pruning at step 10 is done now"):
        engine.detach()
    assert {len(on) for on in gates_of(model).values()} == {2, 57}


def test_the_timeline() -> None:
    rows = {
        SOFT: [
            (3, "gohsp", "ranking by graph, then soft pruning"),
            (8, "heads", "50.00% off (gohsp)"),
            (8, "units", "40.00% off (gohsp)"),
        ],
        "parameter_sparsity: 0.3": [
            (3, "gohsp", "ranking by graph, then soft pruning"),
            (8, "parameters", "30.00% off (gohsp)"),
        ],
        "unit_sparsity: 0.3": [(3, "gohsp", "ranking, then soft pruning"), (8, "units", "30.00% off (gohsp)")],
    }
    for budget, expected in rows.items():
        modifier = recipe(f"gohsp: {{start: 3st, end: 2ep, {budget}}}").modifiers[0]
        assert list(modifier.timeline(Clock(4, 12))) == expected
        assert list(modifier.changes(Clock(4, 12))) == [8]


def test_it_refuses_another_writer_of_the_gates() -> None:
    both = [f"gohsp: {{end: 8st, {SOFT}}}", "s2vite: {head_sparsity: 0.5, every: 2st}"]
    with pytest.raises(
        RecipeError, match=r"s2vite: writes the gate of blocks.0.attn.proj from step 0 to 6, where gohsp"
    ):
        Engine(vit(), recipe(*both), steps_per_epoch=10, epochs=1).prepare()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("end: 5st", "nothing to prune: give 'head_sparsity'"),
        ("end: 5st, parameter_sparsity: 0.3, unit_sparsity: 0.1", "'parameter_sparsity' stands for heads and units"),
        (f"{SOFT}", "end"),
        (f"end: 11st, {SOFT}", r"gohsp.end: '11st' is step 11, past the end of training"),
        (
            f"end: 3st, start: 3st, {SOFT}",
            r"gohsp.end: '3st', step 3, leaves no step of soft pruning after the start at '3st'",
        ),
        (f"end: 5st, {SOFT}, rank: {{score: taylor, steps: 5}}", "after the start at '0ep' and 5 steps of ranking"),
        (f"end: 5st, every: 0.01ep, {SOFT}", r"gohsp.every: '0.01ep' is less than a step"),
        ("end: 5st, head_sparsity: 50", r"sparsity 50 is not in \[0, 1\): did you mean 0.5"),
        (f"end: 5st, {SOFT}, rank: {{score: tailor}}", "did you mean 'taylor'"),
        (f"end: 5st, {SOFT}, rank: {{temperature: 2}}", "'temperature' goes with kernel exp, not shift"),
        (f"end: 5st, {SOFT}, penalty: {{ramp: 0.5}}", "ramp"),
        (f"end: 5st, {SOFT}, rank: {{score: taylor, images: 64}}", "'images' does not go with score 'taylor', which"),
        (f"end: 5st, {SOFT}, rank: {{score: random, steps: 2}}", "'steps' does not go with score 'random'"),
        (f"end: 5st, {SOFT}, rank: {{score: l1, kernel: clip}}", "'kernel' does not go with score 'l1'"),
        (f"end: 5st, {SOFT}, rank: {{seed: 1}}", "'seed' does not go with score 'graph'"),
        ("end: 5st, unit_sparsity: 0.5, rank: {score: l1}", "gohsp: 'rank' is of heads, and none go"),
        ("end: 5st, unit_sparsity: 0.5, penalty: {heads: 1}", "'penalty' has a value for heads, of which none go"),
        (
            f"end: 5st, {SOFT}, penalty: {{heads: 1, units: 1, share: 2}}",
            "'share' does not go with 'heads' and 'units'",
        ),
        ("end: 5st, head_sparsity: 0.9", r"gohsp.head_sparsity: 0.9 is out of reach: with one left in each block 0.75"),
        (
            "end: 5st, parameter_sparsity: 0.9",
            r"gohsp.parameter_sparsity: 0.9 of 15148 is out of reach: 13634 parameters are more than the 12874",
        ),
    ],
)
def test_what_a_recipe_gets_wrong(options: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        started(options)
    assert str(caught.value).startswith("r.yaml:2:")
    assert "\n" not in str(caught.value)


def test_what_training_gets_wrong() -> None:
    with pytest.raises(RecipeError, match="Sequential has no heads to gate"):
        Engine(mlp(), recipe(f"gohsp: {{end: 5st, {SOFT}}}"), steps_per_epoch=10, epochs=1).prepare()
    model, engine = started(f"end: 5st, {SOFT}")
    with pytest.raises(RecipeError, match="LBFGS takes several gradients in one"):
        engine.attach(torch.optim.LBFGS(model.parameters()), calibration=CALIBRATION)
    model, engine = started(f"end: 5st, {SOFT}")
    with pytest.raises(RecipeError, match="ranked by 10 training steps, after which '5st' leaves none: attach"):
        train(model, engine, 0)
    model, engine = started(f"end: 5st, {SOFT}")
    model.blocks[1].mlp.fc1.weight.requires_grad_(False)
    with pytest.raises(RecipeError, match=r"'blocks.1.mlp.fc1.weight' gets no gradient from the training loss"):
        train(model, engine, 1, calibration=CALIBRATION)
    model, engine = started(f"end: 5st, {SOFT}")
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.fill_(math.nan)
    with pytest.raises(RecipeError, match=r"gohsp.rank: blocks.1.attn: similarities of heads are not finite"):
        train(model, engine, 0, calibration=CALIBRATION)
