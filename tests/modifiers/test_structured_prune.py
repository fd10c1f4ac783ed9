"""Structured pruning: which heads and units go by which score, and when, against sorting by hand."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovit_engine import Engine, RecipeError
from ovit_engine.structured.gates import find_sites, install, installed
from ovit_engine.structured.ranking import RANKERS, register_ranker
from ovit_engine.structured.recording import is_recording
from ovit_engine.structured.shrink_model import shrink
from tests.loops import recipe
from tests.modifiers.gated import IMAGES, batch, engine_for, explicit_scores, gates_of, train, vit


def with_options(**options: Any) -> str:
    return f"structured_prune: {{{', '.join(f'{key}: {value}' for key, value in options.items())}}}"


def prune(model: nn.Module, steps: int = 6, **options: Any) -> Engine:
    return train(model, engine_for(model, with_options(**options), steps), steps)


def sizes(model: nn.Module) -> list[int]:
    return [len(on) for on in gates_of(model).values()]


def l1(model: Any, block: int, head: int) -> float:
    attn, d = model.blocks[block].attn, 6
    rows = [part * 24 + head * d + i for part in range(3) for i in range(d)]
    read = attn.proj.weight[:, head * d : head * d + d]
    return float((attn.qkv.weight[rows].abs().sum() + read.abs().sum()).detach())


def off_heads(model: nn.Module) -> set[tuple[int, int]]:
    found = [on for name, on in gates_of(model).items() if "attn" in name]
    return {(block, head) for block, on in enumerate(found) for head in range(4) if head not in on}


# --- which go


def test_the_smallest_heads_of_each_block_go_at_once() -> None:
    """SOMP, of the weights as they are at attach."""
    model = vit()
    expected = {(b, h) for b in (0, 1) for h in sorted(range(4), key=lambda h: l1(model, b, h))[:2]}
    engine_for(model, with_options(head_sparsity=0.5, score="l1", scope="layer")).attach(
        torch.optim.SGD(model.parameters(), 0.1)
    )
    assert off_heads(model) == expected
    assert sizes(model) == [2, 2]  # units have no gate


def test_the_smallest_heads_of_the_model_go_and_one_a_block_stays() -> None:
    model = vit()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.mul_(0.1)  # all heads of block 1 are small
    expected = {(1, h) for h in sorted(range(4), key=lambda h: l1(model, 1, h))[:3]}
    expected |= {(0, h) for h in sorted(range(4), key=lambda h: l1(model, 0, h))[:1]}
    engine_for(model, with_options(head_sparsity=0.5, score="l1")).attach(torch.optim.SGD(model.parameters(), 0.1))
    assert off_heads(model) == expected


@pytest.mark.parametrize("gradients", [1, 3])
def test_taylor_by_explicit_gates(gradients: int) -> None:
    model = vit()
    before = copy.deepcopy(model)
    train(model, engine_for(model, with_options(unit_sparsity=0.3, start="4st", gradients=gradients), 10), 4, rate=0.0)
    engine_for(before, with_options(unit_sparsity=0.3, start="4st"))  # the same gates, all on
    scores = explicit_scores_of(before, [batch(step) for step in range(4 - gradients, 4)])
    order = sorted((value, site, i) for site, each in enumerate(scores) for i, value in enumerate(each.tolist()))
    gone = {(site, i) for _, site, i in order[: 192 - int(192 * 0.7)]}
    found = {(site, i) for site, on in enumerate(gates_of(model).values()) for i in range(96) if i not in on}
    assert found == gone


def explicit_scores_of(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    install(find_sites(model))
    scores = explicit_scores(model, batches)
    return [score for name, score in scores.items() if "mlp" in name]


def test_random_is_by_the_seed() -> None:
    found = []
    for seed in (0, 0, 1, 2):
        model = vit()
        prune(model, unit_sparsity=0.5, score="random", seed=seed)
        found.append(gates_of(model))
    assert found[0] == found[1]
    assert all(one != other for one, other in itertools.combinations(found[1:], 2))


@pytest.mark.parametrize("score", ["l1", "taylor", "salience", "random"])
def test_a_share_of_all_parameters(score: str) -> None:
    model = vit()
    window = {"gradients": 2} if score in ("taylor", "salience") else {}
    engine = prune(model, parameter_sparsity=0.4, score=score, start="2st", **window)
    total = sum(parameter.numel() for parameter in model.parameters())
    gone = sum(int((~site.gate).sum()) * site.parameters for site in installed(model))
    assert 0.4 * total - 2 * 24 - 1 < gone <= 0.4 * total  # as far as whole units go
    logged = {name: value for _, name, value in engine.run.history}
    assert logged["structured_prune/parameters_off"] == gone / total


def test_parameters_that_score_tokens_are_none_of_the_model() -> None:
    """In whichever order the lines stand: predictors come with the recipe."""
    plain = vit(embed_dim=24, img_size=16)
    wanted = sum(parameter.numel() for parameter in plain.parameters())
    lines = ("dynamic_vit: {keep: 0.5, blocks: [1]}", with_options(parameter_sparsity=0.3, score="l1"))
    for each in (lines, lines[::-1]):
        engine = Engine(vit(embed_dim=24, img_size=16), recipe(*each), steps_per_epoch=4, epochs=1).prepare()
        assert {m.name: getattr(m, "_total", None) for m in engine.modifiers} == {
            "dynamic_vit": None,
            "structured_prune": wanted,
        }
    soft = "gohsp: {parameter_sparsity: 0.3, end: 3st}"
    kept = []
    for each in ((soft,), (lines[0], soft), (soft, lines[0])):
        engine = Engine(vit(embed_dim=24, img_size=16), recipe(*each), steps_per_epoch=4, epochs=1).prepare()
        (modifier,) = [m for m in engine.modifiers if m.name == "gohsp"]
        kept.append(modifier._soft_phase._kept)  # type: ignore[attr-defined]
    assert kept[0] == kept[1] == kept[2]


def test_a_ranker_of_another_shape_is_told_with_its_place() -> None:
    register_ranker("all alike", needs="nothing")(lambda site, known: torch.zeros(()))
    try:
        engine = engine_for(vit(), with_options(head_sparsity=0.5, score="all alike", seed=3))
        with pytest.raises(RecipeError, match=r"^r.yaml:2:\d+: structured_prune.score: ranker 'all alike' must give"):
            engine.attach(torch.optim.SGD(engine.model.parameters(), 0.1))
    finally:
        del RANKERS["all alike"]


def test_random_takes_heads_as_often_as_units() -> None:
    """Scores that do not grow with size are not compared by size: heads, which are large, would all go first."""
    off = []
    for seed in range(8):
        model = vit()
        prune(model, 1, parameter_sparsity=0.2, score="random", seed=seed)
        off.append(len(off_heads(model)) / 8)
    assert 0.05 < sum(off) / 8 < 0.5


# --- when


def test_gradual_pruning_never_brings_back() -> None:
    """SGMP for heads, Taylor-like counts for units, each along its own amount."""
    model = vit()
    seen: list[dict[str, list[int]]] = []
    text = with_options(
        head_sparsity="{2st: 0.25, 5st: 0.5}",
        unit_sparsity="{from: 0.2, to: 0.6, curve: cubic}",
        start="1st",
        end="7st",
        every="2st",
        score="l1",
        scope="layer",
    )
    engine = engine_for(model, text, 10)
    train(model, engine, 10, each=lambda step: seen.append(gates_of(model)))
    engine.detach()
    heads = [len(step["blocks.0.attn.proj"]) for step in seen]
    units = [len(step["blocks.1.mlp.fc2"]) for step in seen]
    assert heads == [4, 4, 3, 3, 3, 2, 2, 2, 2, 2, 2]
    shares = [0.6 - 0.4 * (1 - (step - 1) / 6) ** 3 for step in (1, 3, 5, 7)]
    assert units == [96, *[n for share in shares[:3] for n in [int(96 * (1 - share))] * 2], *[38] * 4]
    for before, after in itertools.pairwise(seen):
        assert all(set(after[name]) <= set(on) for name, on in before.items())
    assert list(engine.modifiers[0].changes(engine.run.clock)) == [1, 2, 3, 5, 7]
    rows = list(engine.modifiers[0].timeline(engine.run.clock))
    assert rows[0] == (2, "heads", "25.00% off (structured_prune, l1)")
    assert rows[-1] == (7, "units", "60.00% off (structured_prune, l1)")


def test_gradients_are_recorded_before_a_pruning_step_alone() -> None:
    model = vit()
    text = with_options(head_sparsity="{3st: 0.25, 5st: 0.5, 9st: 0.75}", gradients=2)
    recording = []
    train(model, engine_for(model, text), 10, each=lambda step: recording.append(is_recording(installed(model)[0])))
    assert [step for step, on in enumerate(recording) if on] == [1, 2, 3, 4, 7, 8]


def test_gradients_that_nobody_asked_for_are_as_many_as_there_are() -> None:
    model = vit()
    text = with_options(head_sparsity="{11st: 0.25, 12st: 0.5}")
    recording = []
    engine = engine_for(model, text, 13)
    train(model, engine, 13, each=lambda step: recording.append(is_recording(installed(model)[0])))
    assert [step for step, on in enumerate(recording) if on] == list(range(1, 12))


def test_no_score_by_gradient_is_recorded_for_others() -> None:
    model = vit()
    recording = []
    text = with_options(head_sparsity=0.5, start="5st", score="l1")
    train(model, engine_for(model, text), 6, each=lambda step: recording.append(is_recording(installed(model)[0])))
    assert not any(recording)


def test_steps_that_are_missing_at_the_end() -> None:
    model = vit()
    engine = train(model, engine_for(model, with_options(head_sparsity=0.5, start="100%"), 100), 99)
    with pytest.warns(UserWarning, match="the optimizer applied 99 of 100 steps .*step 100 is done now"):
        engine.detach()
    assert sum(sizes(model)) == 4
    model = vit()
    engine = train(model, engine_for(model, with_options(head_sparsity=0.5, start="9st"), 10), 4)
    with pytest.raises(RuntimeError, match="training ended before pruning at step 9: the optimizer applied 4 of 10"):
        engine.detach()


def test_an_average_follows_and_a_resumed_run_is_the_same() -> None:
    text = with_options(parameter_sparsity="{from: 0.1, to: 0.4}", start="3st", end="7st", every="2st", gradients=2)

    def run(cut: int | None) -> tuple[nn.Module, nn.Module]:
        done, states = 0, None
        for end in (10,) if cut is None else (cut, 10):
            model = vit()
            engine = engine_for(model, text)
            if states is not None:
                engine.load_state_dict(states[1])
                model.load_state_dict(states[0])
            average = copy.deepcopy(model)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            engine.attach(optimizer, ema=average)
            for step in range(done, end):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
                optimizer.step()
            done, states = end, copy.deepcopy((model.state_dict(), engine.state_dict()))
        return model, average

    whole, average = run(None)
    assert gates_of(whole) == gates_of(average)
    for cut in (2, 3, 4, 6):
        other, _ = run(cut)
        for key, value in whole.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), (cut, key)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "l1"}, "nothing to prune: give 'head_sparsity', 'unit_sparsity' or 'parameter_sparsity'"),
        ({"head_sparsity": 0.5, "parameter_sparsity": 0.5}, "'parameter_sparsity' stands for heads and units"),
        ({"parameter_sparsity": 0.5, "scope": "layer"}, "'scope: layer' does not go with 'parameter_sparsity'"),
        ({"head_sparsity": 0.5, "score": "tailor"}, "there is no ranker 'tailor'; did you mean 'taylor'"),
        ({"head_sparsity": "{from: 0.1, to: 0.5}"}, "a sparsity range needs 'end' and 'every'"),
        ({"head_sparsity": 0.5, "end": "3st"}, "'end' and 'every' go with a sparsity range"),
        ({"head_sparsity": "{2st: 0.5}", "start": "3st"}, "'start' does not go with a sparsity for each time"),
        ({"head_sparsity": 50}, r"sparsity 50 is not in \[0, 1\): did you mean 0.5"),
        ({"head_sparsity": 0.5, "score": "l1", "gradients": 2}, "'gradients' does not go with score 'l1', which takes"),
        ({"head_sparsity": 0.5, "score": "random", "gradients": 2}, "'gradients' does not go with score 'random'"),
        ({"head_sparsity": 0.5, "score": "l1", "seed": 0}, "'seed' does not go with score 'l1', in which nothing is"),
        ({"head_sparsity": 0.5, "seed": 1}, "'seed' does not go with score 'taylor'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=rf"^r.yaml:2:\d+: structured_prune.*{words}"):
        recipe(with_options(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_sparsity": 0.5}, r"start: at step 0 no gradient was seen, which score 'taylor' needs: prune later"),
        ({"head_sparsity": "{0st: 0.5}"}, r"head_sparsity: at step 0 no gradient was seen"),
        ({"head_sparsity": "{2st: 0.5, 11st: 0.6}"}, r"head_sparsity: '11st' is past the end of training at step 10"),
        ({"unit_sparsity": "{2st: 0.5, 3st: 0.4}"}, r"unit_sparsity: sparsity falls from 0.5 at 2st to 0.4 at 3st"),
        (
            {"parameter_sparsity": 0.95, "start": "1st"},
            r"parameter_sparsity: 0.95 is out of reach: with one head and one unit left in each block 0\.\d+ of",
        ),
        (
            {"head_sparsity": 0.95, "start": "1st", "scope": "layer"},
            r"head_sparsity: 0.95 is out of reach: with one left in each block 0.7500 of the 4 heads",
        ),
        (
            {"head_sparsity": 0.85, "start": "1st"},
            r"head_sparsity: 0.85 is out of reach: with one left in each block 0.7500 of the 8 heads",
        ),
        (
            {"head_sparsity": 0.5, "start": "3st", "gradients": 4},
            r"gradients: 4 gradients are more than the 3 steps before the pruning step 3",
        ),
        (
            {"head_sparsity": "{3st: 0.25, 8st: 0.5}", "unit_sparsity": "{6st: 0.25}", "gradients": 3},
            r"gradients: 3 gradients are more than the 2 steps before the pruning step 8",
        ),
    ],
)
def test_what_can_not_be_followed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=rf"^r.yaml:2:\d+: structured_prune.{words}"):
        engine_for(vit(), with_options(**options))


def test_rankers_that_do_not_fit() -> None:
    register_ranker("of heads", needs="nothing", kinds=["heads"])(lambda site, known: torch.zeros(site.count))
    register_ranker("of outputs", needs="outputs")(lambda site, known: torch.zeros(site.count))
    try:
        recipe(with_options(head_sparsity=0.5, score="of heads"))
        with pytest.raises(RecipeError, match="score 'of heads' ranks heads, not units"):
            recipe(with_options(unit_sparsity=0.5, score="of heads"))
        with pytest.raises(RecipeError, match="score 'of outputs' needs outputs of heads, which are not recorded here"):
            recipe(with_options(head_sparsity=0.5, score="of outputs"))
    finally:
        del RANKERS["of heads"], RANKERS["of outputs"]


def test_a_model_that_never_trains_has_no_scores() -> None:
    model = vit()
    engine = engine_for(model, with_options(head_sparsity=0.5, start="2st"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    model.eval()
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    nn.functional.cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
    with pytest.raises(RecipeError, match=r"no finite gradient came to the gate of 'blocks.0.attn.proj'"):
        optimizer.step()


def test_a_second_one_takes_over_where_the_first_has_ended() -> None:
    """Each has scores of its own; the first does not end the window of the second."""
    first = with_options(head_sparsity=0.25, start="3st", gradients=2)
    second = with_options(head_sparsity=0.5, start="7st", gradients=2)
    for lines in ((first, second), (second, first)):
        model = vit()
        engine = Engine(model, recipe(*lines), steps_per_epoch=10, epochs=1).prepare()
        train(model, engine, 10)
        engine.detach()
        assert len(off_heads(model)) == 4


def test_windows_that_overlap_are_refused() -> None:
    lines = (
        with_options(head_sparsity=0.25, start="3st", gradients=2),
        with_options(head_sparsity=0.5, start="4st", gradients=2),
    )
    with pytest.raises(RecipeError, match=r"r.yaml:3:\d+: .*the gate of blocks.0.attn.proj from step 2 to 4"):
        Engine(vit(), recipe(*lines), steps_per_epoch=10, epochs=1).prepare()


def test_a_share_that_would_take_whole_blocks_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"head_sparsity: 0.95 is out of reach: with one left in each block 0.7500 of"
    ):
        engine_for(vit(), with_options(head_sparsity=0.95, start="1st"))


def test_a_model_without_its_gates_is_not_exported(tmp_path: Path) -> None:
    """A finished run whose weights were loaded without gates would be a dense file under a pruning recipe."""
    model = vit()
    engine = engine_for(model, with_options(head_sparsity=0.5, start="3st", gradients=2))
    train(model, engine, 10)
    engine.detach()
    again = vit()
    loaded = engine_for(again, with_options(head_sparsity=0.5, start="3st", gradients=2))
    loaded.load_state_dict(engine.state_dict())
    weights = {name: value for name, value in model.state_dict().items() if "gate" not in name}
    again.load_state_dict(weights)
    with pytest.raises(RuntimeError, match=r"the gate of 'blocks.0.attn.proj' is not as training left it"):
        loaded.export(tmp_path / "m.onnx", IMAGES[:1])
    again.load_state_dict(model.state_dict())
    assert "4 of 8 heads" in str(loaded.export(tmp_path / "m.onnx", IMAGES[:1]))


def test_the_engines_state_outlives_the_gates() -> None:
    model = vit()
    engine = engine_for(model, with_options(head_sparsity=0.5, start="3st", gradients=2))
    train(model, engine, 10)
    engine.detach()
    before = engine.state_dict()["modifiers"][0]["gates"]
    shrink(model)
    after = engine.state_dict()["modifiers"][0]["gates"]
    assert all(torch.equal(before[name], after[name]) for name in before)
