"""S2ViTE in loops of all kinds, after restarts, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovit_engine import Engine, RecipeError
from tests.loop_matrix import LOOPS, STEPS
from tests.loops import recipe
from tests.modifiers.gated import batch, engine_for, gates_of, train, vit
from tests.modifiers.test_s2vite import S2VITE, modifier_of, with_options

# --- loops, copies, restarts, processes


LOOPS_HERE = [
    *("accumulation", "several optimizers", "fp16, scaler", "fp16, scaler, fused", "bf16 autocast", "bf16 weights"),
    *("lbfgs", "checkpointing", "reentrant checkpointing", "ema of timm"),
    *("ema of torch", "lookahead", "tied weights"),
]


@pytest.mark.parametrize("name", LOOPS_HERE)
def test_every_loop(name: str) -> None:
    torch._dynamo.reset()
    loop, make = LOOPS[name]
    model = make()
    text = "s2vite: {head_sparsity: 0.5, unit_sparsity: 0.4, every: 4st, gradients: 2, mlp_growth: gate}"
    engine = Engine(model, recipe(text), steps_per_epoch=STEPS // 2, epochs=2)
    applied, gates = 0, None
    for step_applied in loop(model, engine):
        applied += step_applied
        now = gates_of(model)
        assert {len(on) for site, on in now.items() if "attn" in site} == {1}
        assert {len(on) for site, on in now.items() if "mlp" in site} == {38}
        if not step_applied or applied % 4:
            assert gates in (None, now)
        gates = now
        if name.startswith("ema"):
            assert gates_of(model.ema[0].module) == now
    assert applied == STEPS
    engine.detach()
    assert modifier_of(engine)._done == 16
    assert len({value for _, what, value in engine.run.history if what == "s2vite/units_ever_on"}) > 2


def test_a_compiled_model() -> None:
    """With `fullgraph`, where recording may not leave the graph either; one more graph is compiled for its steps."""
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model = vit(depth=1)
        engine = engine_for(model, with_options(every="3st", end="100%"), 8)
        loop = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        engine.attach(optimizer)
        for step in range(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(loop(batch(step)[0]), batch(step)[1]).backward()
            optimizer.step()
        found.append(gates_of(model))
    assert found[0] == found[1]


def test_a_frozen_block_has_no_scores() -> None:
    model = vit()
    for part in (model.patch_embed, model.blocks[0]):
        part.requires_grad_(False)
    model.pos_embed.requires_grad_(False)
    model.cls_token.requires_grad_(False)
    with pytest.raises(RecipeError, match=r"^r.yaml:2:5: s2vite: no finite gradient came to the gate of 'blocks.0"):
        train(model, engine_for(model, S2VITE), 3)


def resumed(cut: int, *, model_too: bool = True, lose: str = "") -> tuple[nn.Module, Engine]:
    text = with_options(every="4st", gradients=3)
    model = vit()
    engine = train(model, engine_for(model, text, 12), cut)
    states = copy.deepcopy((model.state_dict(), engine.state_dict()))
    model = vit()
    engine = engine_for(model, text, 12)
    if lose:
        states[1]["modifiers"][0][lose] = {}
    engine.load_state_dict(states[1])
    if model_too:
        model.load_state_dict(states[0])
    return model, engine


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6])
def test_resumed_in_the_middle_of_a_window(cut: int) -> None:
    """Plain SGD, so that model and engine are all the state there is."""

    def go_on(model: nn.Module, engine: Engine, first: int, attach: bool) -> None:
        if attach:
            engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        (optimizer,) = engine.run.optimizers
        for step in range(first, 12):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
            optimizer.step()

    whole = vit()
    engine = engine_for(whole, with_options(every="4st", gradients=3), 12)
    go_on(whole, engine, 0, True)
    part = vit()
    first = engine_for(part, with_options(every="4st", gradients=3), 12)
    first.attach(torch.optim.SGD(part.parameters(), 0.1))
    for step in range(cut):
        first.run.optimizers[0].zero_grad()
        nn.functional.cross_entropy(part(batch(step)[0]), batch(step)[1]).backward()
        first.run.optimizers[0].step()
    model = vit()
    second = engine_for(model, with_options(every="4st", gradients=3), 12)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    model.load_state_dict(part.state_dict())
    go_on(model, second, cut, True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert engine.run.history == second.run.history
    assert engine.state_dict()["modifiers"][0]["ever"].keys() == second.state_dict()["modifiers"][0]["ever"].keys()


def test_a_state_without_the_models_is_refused() -> None:
    model, engine = resumed(4, model_too=False)
    with pytest.raises(RuntimeError, match=r"^s2vite: at step 4 the gate of 'blocks.0.attn.proj' is not that of "):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1))


def test_half_a_state_is_refused() -> None:
    model, engine = resumed(6, lose="sums")
    with pytest.raises(RecipeError, match="half a state was loaded: it lacks the scores recorded since step 5"):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"the checkpoint's gate of 'blocks.0.attn.proj' must be \[4\], it is missing"):
        resumed(6, lose="gates")


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("gates", {"nope": torch.ones(4)}, "the checkpoint's gate of 'nope' is of no layer here"),
        ("gates", {"blocks.0.attn.proj": torch.ones(3)}, r"gate of 'blocks.0.attn.proj' must be \[4\], it is \[3\]"),
        (
            "sums",
            {"blocks.0.attn.proj": torch.ones(3)},
            r"scores of 'blocks.0.attn.proj' must be of shape \[4, 4\]",
        ),
        ("ever", {"blocks.0.attn.proj": torch.ones(3)}, r"record of 'blocks.0.attn.proj' \[3\] fits nothing here"),
    ],
)
def test_damaged_states_are_refused(part: str, change: dict[str, Tensor], words: str) -> None:
    model = vit()
    engine = train(model, engine_for(model, S2VITE), 2)
    state = copy.deepcopy(engine.state_dict())
    state["modifiers"][0][part].update(change)
    with pytest.raises(ValueError, match=words):
        engine_for(vit(), S2VITE).load_state_dict(state)


def test_training_that_ends_early() -> None:
    model = vit()
    engine = train(model, engine_for(model, S2VITE, 10), 4)
    with pytest.raises(RuntimeError, match="s2vite: training ended before freezing the gates: the optimizer applied 4"):
        engine.detach()


# --- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("every: 3st", "nothing to switch off: give 'head_sparsity', 'unit_sparsity' or both"),
        ("head_sparsity: 0.5, every: 3st, drop: 0.1, drop_end: 0.2", "the share that moves falls: 'drop' is 0.1"),
        ("head_sparsity: 50, every: 3st", r"sparsity 50 is not in \[0, 1\): did you mean 0.5"),
        ("head_sparsity: 0.5, every: 3st, score: nope", "'gate' or 'official'"),
        (
            "head_sparsity: 0.5, every: 3st, mlp_growth: official",
            "'mlp_growth' goes with 'unit_sparsity': no units",
        ),
    ],
)
def test_options_that_make_no_sense(options: str, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"^r.yaml:2:\d+: s2vite.*{words}"):
        recipe(f"s2vite: {{{options}}}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": "0.01ep"}, r"every: '0.01ep' is less than a step of 10 steps an epoch"),
        ({"every": "8st"}, r"every: no update comes before the end at '80%', step 8: update more often"),
        ({"end": "11st"}, r"end: '11st' is step 11, past the end of training at step 10"),
        ({"gradients": 4}, r"gradients: 4 gradients are more than the 3 steps between updates"),
        (
            {"head_sparsity": 0.95},
            r"head_sparsity: 0.95 is out of reach: with one left in each block 0.7500 of the 4",
        ),
        ({"unit_sparsity": 0.999}, r"unit_sparsity: 0.999 is out of reach: with one left in each block 0.98"),
    ],
)
def test_times_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=rf"^r.yaml:2:\d+: s2vite.{words}"):
        engine_for(vit(), with_options(**options))


def test_models_and_recipes_in_which_gates_make_no_sense() -> None:
    with pytest.raises(RecipeError, match=r"^r.yaml:2:5: s2vite: Sequential has no heads to gate"):
        engine_for(nn.Sequential(nn.Linear(2, 2)), S2VITE)
    both = recipe(S2VITE, "structured_prune: {head_sparsity: 0.5, start: 2st}")
    with pytest.raises(RecipeError, match=r"writes the gate of blocks.0.attn.proj from step 0 to 2, where s2vite "):
        Engine(vit(), both, steps_per_epoch=10, epochs=1).prepare()
    with pytest.raises(RuntimeError, match="s2vite replaces layers, and the model is compiled already"):
        engine_for(torch.compile(vit(), backend="eager"), S2VITE)  # type: ignore[arg-type]


def test_the_timeline() -> None:
    rows = list(modifier_of(engine_for(vit(), S2VITE, 100)).timeline(engine_for(vit(), S2VITE, 100).run.clock))
    assert rows[:3] == [
        (0, "heads", "50.00% off (s2vite), at random"),
        (3, "heads", "49.89% change, and again every 3st"),
        (78, "heads", "6.18% change, a last time"),
    ]
    assert [step for step, what, _ in rows if what == "units"] == [0, 3, 78]
