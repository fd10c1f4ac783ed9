"""AC/DC: the published phases, the mask of each, and a dense phase that is really dense."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import Clock, Engine, RecipeError
from tests.loops import mlp, plain, recipe, zeros

PAPER = "start: 150ep, every: 25ep, last_dense: 50ep, last_sparse: 75ep, sparsity: 0.9, targets: [a]"


def phases(options: str, clock: Clock) -> dict[int, str]:
    modifier: Any = recipe(f"acdc: {{{options}}}").modifiers[0]
    found: dict[int, str] = modifier.phases(clock)
    return found


def test_the_phases_of_the_paper() -> None:
    """Appendix J, 600 epochs: seven sparse of 25, six dense of 25, dense 50, sparse 75."""
    found = phases(PAPER, Clock(steps_per_epoch=1, total_steps=600))
    lengths = [
        (phase, after - step) for (step, phase), after in zip(found.items(), [*list(found)[1:], 600], strict=True)
    ]
    assert lengths == [("sparse", 25), ("dense", 25)] * 6 + [("sparse", 25), ("dense", 50), ("sparse", 75)]
    assert next(iter(found)) == 150


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("every: 10st", {0: "sparse", 10: "dense", 20: "sparse", 30: "dense", 40: "sparse"}),
        ("every: 20st", {0: "sparse", 20: "dense", 40: "sparse"}),
        ("every: 10st, start: 20st", {20: "sparse", 30: "dense", 40: "sparse"}),
        ("every: 10st, end: 30st", {0: "sparse", 10: "dense", 20: "sparse"}),
        ("every: 10st, last_sparse: 30st", {0: "sparse", 10: "dense", 20: "sparse"}),
        ("every: 10st, last_dense: 5st", {0: "sparse", 10: "dense", 20: "sparse", 30: "dense", 35: "sparse"}),
    ],
)
def test_other_phases(options: str, expected: dict[int, str]) -> None:
    assert phases(f"sparsity: 0.5, targets: [a], {options}", Clock(10, 60)) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("every: 30st", "acdc.every: 60 steps from start to end do not hold a sparse phase of 30, a dense one of 30"),
        ("every: 0.01ep", "acdc.every: '0.01ep' is less than a step"),
        ("every: 1ep, end: 7ep", "acdc.end: '7ep' is step 70, past the end of training"),
    ],
)
def test_times_that_make_no_phases(options: str, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"^r.yaml:2:\d+: {words}"):
        phases(f"sparsity: 0.5, targets: [a], {options}", Clock(10, 60))


def test_the_timeline_tells_the_phases() -> None:
    modifier = recipe("acdc: {every: 2ep, pattern: '2:4', targets: [a]}").modifiers[0]
    assert list(modifier.timeline(Clock(1, 6))) == [
        (0, "sparsity", "50.00% 2:4 (acdc)"),
        (2, "sparsity", "dense (acdc)"),
        (4, "sparsity", "50.00% 2:4 (acdc)"),
    ]


def started(options: str, optimizer_type: Callable[..., Any] = torch.optim.AdamW) -> tuple[Any, Any, Engine]:
    model = mlp()
    optimizer = optimizer_type(model.parameters(), 0.05)
    text = f"acdc: {{targets: [0.weight], {options}}}"
    return model, optimizer, Engine(model, recipe(text), steps_per_epoch=12, epochs=1).attach(optimizer)


def test_masks_alternate_are_found_anew_and_stay_inside_of_a_phase() -> None:
    model, optimizer, engine = started("every: 2st, start: 2st, last_sparse: 4st, sparsity: 0.5")
    masks = []
    with engine:
        for step in range(1, 13):
            plain(model, optimizer)
            sparse = 2 <= step < 4 or step >= 6
            assert zeros(model[0]) in ((64,) if sparse else (0, 64))
            mask = engine.run.masks.get("0.weight")
            if step == 5:
                assert zeros(model[0]) == 0
                with torch.no_grad():
                    model[0].weight[~masks[0]] *= 1000  # what was small is large now
            if sparse:
                assert mask is not None
                masks.append(mask.clone())
    assert masks[0].equal(masks[1])
    assert not masks[0].equal(masks[2])
    assert all(mask.equal(masks[2]) for mask in masks[2:])
    assert [value for _, _, value in engine.run.history] == [0.5, 0.0, 0.5]


def test_a_sparse_phase_takes_the_smallest_whatever_was_pruned_before() -> None:
    model, optimizer, engine = started("every: 2st, last_sparse: 8st, sparsity: 0.5")
    for _ in range(3):
        plain(model, optimizer)
    step: list[torch.Tensor] = []
    handle = optimizer.register_step_post_hook(lambda *_: step.append(model[0].weight.detach().clone()))
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # before the engine prunes
    plain(model, optimizer)
    mask = engine.run.masks.get("0.weight")
    assert mask is not None
    smallest = step[0].flatten().abs().argsort()[:64]
    assert sorted((~mask).flatten().nonzero().flatten().tolist()) == sorted(smallest.tolist())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (lambda p, lr: torch.optim.AdamW(p, lr, amsgrad=True), ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), ["momentum_buffer"]),
        (torch.optim.RMSprop, ["square_avg"]),
    ],
)
def test_revived_weights_have_no_past_in_the_optimizer(kind: Callable[..., Any], names: list[str]) -> None:
    model, optimizer, engine = started("every: 4st, sparsity: 0.5", kind)
    for _ in range(3):
        plain(model, optimizer)
    mask = engine.run.masks.get("0.weight")
    assert mask is not None
    mask = mask.clone()
    state = optimizer.state[model[0].weight]
    assert all(bool((state[name][~mask] != 0).any()) for name in names)  # gradients are dense
    others = {name: optimizer.state[model[2].weight][name].clone() for name in names}
    plain(model, optimizer)  # its end begins the dense phase
    for name in names:
        assert bool((state[name][~mask] == 0).all())
        assert bool((state[name][mask] != 0).any())
        assert not optimizer.state[model[2].weight][name].equal(others[name])  # not a target: goes on
        assert bool(optimizer.state[model[2].weight][name].any())
    assert "step" not in state or int(state["step"]) == 4
    assert zeros(model[0]) == 64  # they start again from zero ...
    plain(model, optimizer)
    assert zeros(model[0]) == 0  # ... and are free


@pytest.mark.parametrize("pattern", ["pattern: '2:4'", "pattern: {block: [1, 4]}, sparsity: 0.5"])
def test_patterns(pattern: str) -> None:
    model, optimizer, engine = started(f"every: 4st, {pattern}")
    with engine:
        for _ in range(12):
            plain(model, optimizer)
    groups = (model[0].weight == 0).unflatten(1, (-1, 4)).sum(-1)
    assert set(groups.flatten().tolist()) <= ({2} if "2:4" in pattern else {0, 4})
    assert zeros(model[0]) == 64


def test_a_dense_phase_frees_copies_too() -> None:
    model, optimizer, engine = started("every: 4st, sparsity: 0.5")
    for _ in range(5):
        plain(model, optimizer)
    copy = mlp()
    nn.init.ones_(copy[0].weight)  # type: ignore[arg-type]
    engine.apply_to(copy)
    assert zeros(copy[0]) == 0


def test_training_that_ends_in_a_dense_phase_is_compressed_if_few_steps_lack() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    text = "acdc: {every: 33st, last_dense: 66st, last_sparse: 1st, sparsity: 0.5, targets: [0.weight]}"
    engine = Engine(model, recipe(text), steps_per_epoch=100, epochs=1).attach(optimizer)
    for step in range(98):
        if step == 90:
            with pytest.raises(RuntimeError, match="acdc: training ended before the last sparse phase at step 99"):
                engine.modifiers[0].detach(engine.run)
        plain(model, optimizer)
    assert zeros(model[0]) == 0
    with pytest.warns(UserWarning, match="the last sparse phase at step 99 is done now"):
        engine.detach()
    assert zeros(model[0]) == 64
