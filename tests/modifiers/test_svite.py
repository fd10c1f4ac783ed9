"""SViTE: sparse from the first step on, connections move by the published rules, and nothing else does."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ovit_engine import Clock, Engine
from ovit_engine.pruning.problem import erk_counts
from tests.loops import mlp, plain, recipe
from tests.pruning.test_rewire import searched

STEPS = 24


def started(
    options: str,
    make: Callable[..., Any] = torch.optim.AdamW,
    *,
    model: nn.Module | None = None,
    targets: str = "0.weight",
    steps: int = STEPS,
    lr: float = 0.05,
) -> tuple[Any, Any, Engine]:
    model = mlp() if model is None else model
    optimizer = make(model.parameters(), lr)
    text = f"svite: {{targets: [{targets}], {options}}}"
    return model, optimizer, Engine(model, recipe(text), steps_per_epoch=steps, epochs=1).attach(optimizer)


def masks_of(engine: Engine) -> dict[str, Tensor]:
    return {name: mask.clone() for name in engine.run.masks.names() if (mask := engine.run.masks.get(name)) is not None}


def before_the_engine(optimizer: Any, see: Callable[[], object]) -> None:
    """Call `see` after the optimizer's step and before what the engine does then."""
    handle = optimizer.register_step_post_hook(lambda *_: see())
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)


# --- how much moves, and when


def test_the_share_that_moves_follows_a_cosine_over_all_of_training() -> None:
    """U7."""
    modifier: Any = recipe("svite: {every: 10st, sparsity: 0.5, targets: [a]}").modifiers[0]
    clock = Clock(100, 1000)
    assert [modifier.share(step, clock) for step in (0, 500, 1000)] == pytest.approx([0.5, 0.2525, 0.005])
    assert modifier.share(250, clock) == pytest.approx(0.005 + 0.495 / 2 * (1 + math.cos(math.pi / 4)))
    assert list(modifier.updates(clock)) == list(range(10, 800, 10))  # none at 80 %
    short: Any = recipe("svite: {every: 10st, end: 795st, sparsity: 0.5, targets: [a]}").modifiers[0]
    assert short.updates(clock)[-1] == 790


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_masks_change_at_updates_alone(grow: str) -> None:
    model, optimizer, engine = started(f"every: 5st, end: 16st, sparsity: 0.5, grow: {grow}")
    changed = []
    with engine:
        before = masks_of(engine)
        for step in range(1, STEPS + 1):
            plain(model, optimizer)
            now = masks_of(engine)
            if not now["0.weight"].equal(before["0.weight"]):
                changed.append(step)
            before = now
    assert changed == [5, 10, 15]
    assert not engine.state_dict()["modifiers"][0]["gains"]  # none are taken after the last update


def test_the_timeline_tells_start_first_and_last_update() -> None:
    clock = Clock(10, 100)
    modifier = recipe("svite: {every: 30st, sparsity: 0.5, targets: [a]}").modifiers[0]
    assert list(modifier.timeline(clock)) == [
        (0, "topology", "50.00% unstructured (svite), at random"),
        (30, "topology", "39.80% moves, and again every 30st"),
        (60, "topology", "17.60% moves, a last time"),
    ]
    assert list(modifier.changes(clock)) == [0, 30, 60]
    trained = recipe("svite: {every: 30st, pattern: '2:4', init: magnitude, targets: [a]}").modifiers[0]
    assert next(iter(trained.timeline(clock))) == (0, "sparsity", "50.00% 2:4 (svite)")


# --- where it starts


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "in_chans": 1, "num_classes": 4, "embed_dim": 12, "depth": 2}
    return timm.create_model("vit_tiny_patch16_224", num_heads=2, **sizes)


EVERYWHERE = r"'re:.*(patch_embed\.proj|qkv|proj|fc1|fc2|head)\.weight'"


@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_it_starts_with_exact_counts(init: str) -> None:
    """U1: over all matrices and the patch embedding."""
    dense = vit()
    options = f"every: 4st, sparsity: 0.6, init: {init}"
    model, _, engine = started(options, model=copy.deepcopy(dense), targets=EVERYWHERE)
    masks = masks_of(engine)
    assert len(masks) == 2 * 4 + 2
    sizes = [mask.numel() for mask in masks.values()]
    kept = erk_counts([mask.shape for mask in masks.values()], sizes, sum(sizes) - round(0.6 * sum(sizes)))
    assert [int(mask.sum()) for mask in masks.values()] == kept
    for name, mask in masks.items():
        before = dense.get_parameter(name).detach()
        assert model.get_parameter(name).equal(before * mask)
        if init == "magnitude":
            assert mask.all() or before[mask].abs().min() >= before[~mask].abs().max()
    zeros = round(0.6 * sum(sizes)) / sum(sizes)
    assert [name for _, name, _ in engine.run.history] == ["svite/sparsity", "svite/ever_active"]
    assert [value for _, _, value in engine.run.history] == pytest.approx([zeros, 1 - zeros], abs=1e-12)


@pytest.mark.parametrize(
    ("scope", "counts"),
    [("erk", None), ("layer", [64, 8]), ("global", None)],
)
def test_how_the_sparsity_is_shared_out(scope: str, counts: list[int] | None) -> None:
    _, _, engine = started(f"every: 4st, sparsity: 0.5, scope: {scope}", targets="0.weight, 2.weight")
    found = [int(mask.sum()) for mask in masks_of(engine).values()]
    assert sum(found) == 72
    if scope == "erk":  # dimensions 24 and 17: both would keep alike, but the second has 16
        assert found == [56, 16]
    if counts is not None:
        assert found == counts


def test_the_seed_decides_and_nothing_else() -> None:
    def start(seed: int, manual: int) -> Tensor:
        torch.manual_seed(manual)
        return masks_of(started(f"every: 4st, sparsity: 0.5, seed: {seed}")[2])["0.weight"]

    assert start(0, 1).equal(start(0, 2))
    assert not start(0, 1).equal(start(1, 1))


class Wider(nn.Module):
    """The model of tests/loops.py with a parameter more, in front."""

    def __init__(self) -> None:
        super().__init__()
        self.unrelated = nn.Parameter(torch.ones(8, 8))
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x @ torch.eye(8))
        return out


def test_masks_go_by_name() -> None:
    """U13: other parameters, and other targets, change no mask."""
    one, two = Wider(), Wider()
    del one.unrelated
    found = []
    for model, targets in ((one, "body.0.weight"), (two, "body.0.weight, unrelated")):
        trained, optimizer, engine = started(
            "every: 4st, sparsity: 0.5, scope: layer, grow: random", model=model, targets=targets
        )
        starts = masks_of(engine)["body.0.weight"]
        for _ in range(8):
            if hasattr(trained, "unrelated"):
                trained.unrelated.grad = torch.zeros(8, 8)
            optimizer.step()
        found.append((starts, masks_of(engine)["body.0.weight"]))
    assert found[0][0].equal(found[1][0])
    first, second = masks_of(engine)["unrelated"], found[1][1]
    assert not second.equal(found[1][0])
    assert first.shape == (8, 8)
    state = engine.state_dict()
    assert set(state["masks"]) == set(state["modifiers"][0]["ever"]) == {"body.0.weight", "unrelated"}


# --- what moves


PATTERNS = [
    ("sparsity: 0.5", "unstructured"),
    ("pattern: '2:4'", "2:4"),
    ("sparsity: 0.5, pattern: {block: [2, 2]}", {"block": [2, 2]}),
]


@pytest.mark.parametrize(("options", "spelling"), PATTERNS)
def test_the_smallest_go_and_the_largest_gradients_come(options: str, spelling: object) -> None:
    """U4, U6: by a plain search, on what the optimizer left and the dense gradient of its step."""
    model, optimizer, engine = started(f"every: 4st, {options}")
    modifier: Any = engine.modifiers[0]
    weights: list[Tensor] = []
    before_the_engine(optimizer, lambda: weights.append(model[0].weight.detach().clone()))
    updates = 0
    for step in range(1, STEPS + 1):
        before = masks_of(engine)["0.weight"]
        plain(model, optimizer)
        after, gradient = masks_of(engine)["0.weight"], model[0].weight.grad
        assert bool(gradient[~before].any())
        if step in modifier.updates(engine.run.clock):
            share = modifier.share(step, engine.run.clock)
            expected = searched(weights[-1] * before, before, gradient.abs(), spelling, share)
            assert after.equal(expected)
            updates += not after.equal(before)
    assert updates == 4


@pytest.mark.parametrize("options", [options for options, _ in PATTERNS])
def test_patterns_hold_at_every_step(options: str) -> None:
    model, optimizer, engine = started(f"every: 1st, {options}")
    with engine:
        for _ in range(STEPS):
            plain(model, optimizer)
            mask = masks_of(engine)["0.weight"]
            assert int(mask.sum()) == 64
            assert not model[0].weight[~mask].any()
            if "2:4" in options:
                assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
            if "block" in options:
                assert set(mask.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).sum((1, 3)).flatten().tolist()) == {0, 4}


def coarse() -> nn.Module:
    """A layer of three values, and one whose gradient is always zero."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.coarse, self.idle, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 1)
            with torch.no_grad():
                self.coarse.weight.copy_(torch.randint(-1, 2, (16, 8)))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.coarse(x) + 0 * self.idle(x))
            return out

    return Model()


def test_counts_are_constant_through_fifty_updates() -> None:
    """U2: under ties, and without a gradient."""
    torch.manual_seed(0)
    model, optimizer, engine = started(
        "every: 1st, sparsity: 0.6", torch.optim.SGD, model=coarse(), targets="'re:.*weight'", steps=70, lr=0.0
    )
    counts = {name: int(mask.sum()) for name, mask in masks_of(engine).items()}
    start = masks_of(engine)
    for _ in range(55):
        plain(model, optimizer)
        now = masks_of(engine)
        assert {name: int(mask.sum()) for name, mask in now.items()} == counts
    assert not model.idle.weight.grad.any()
    assert not now["idle.weight"].equal(start["idle.weight"])
    assert len([name for _, name, _ in engine.run.history if name == "svite/ever_active"]) == 1 + 55


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr, amsgrad=True, foreach=False),
    "adamw, foreach": lambda p, lr: torch.optim.AdamW(p, lr, foreach=True),
    "adamw, fused": lambda p, lr: torch.optim.AdamW(p, lr, fused=True),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_new_connections_start_from_nothing_and_old_ones_go_on(name: str) -> None:
    """U3, U5."""
    model, optimizer, engine = started("every: 6st, sparsity: 0.5, drop: 0.9", OPTIMIZERS[name])
    weight = model[0].weight
    seen: list[tuple[Tensor, dict[str, Tensor]]] = []

    def look() -> None:
        state = {key: value.clone() for key, value in optimizer.state[weight].items() if value.shape == weight.shape}
        seen.append((weight.detach().clone(), state))

    before_the_engine(optimizer, look)
    back = 0
    for step in range(1, STEPS + 1):
        old = masks_of(engine)["0.weight"]
        plain(model, optimizer)
        new = masks_of(engine)["0.weight"]
        assert not weight[~new].any()
        assert not weight[new & ~old].any()
        values, state = seen[-1]
        assert weight[new & old].equal(values[new & old])
        assert state
        for key, value in state.items():
            now = optimizer.state[weight][key]
            assert now[~(new & ~old)].equal(value[~(new & ~old)]), key
            assert not now[new & ~old].any(), key
        if step in (6, 12, 18):
            fresh = new & ~old
            assert bool(fresh.any())
            assert all(bool(value[fresh].any()) for value in state.values())  # there was something to forget
            smallest = (values * old).abs().masked_fill(~old, torch.inf).flatten().argsort()
            share = engine.modifiers[0].share(step, engine.run.clock)  # type: ignore[attr-defined]
            went = torch.zeros_like(old).flatten()
            went[smallest[: math.ceil(share * 64)]] = True
            back += int((went.view_as(old) & new).sum())
    assert back > 0  # dropped and regrown, and yet as they were


def test_gradients_of_several_steps_add_up() -> None:
    """Their sizes: 1 and -1 do not cancel."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    _, optimizer, engine = started(
        "every: 3st, gradients: 2, sparsity: 0.5, init: magnitude, drop: 0.25, drop_end: 0.25",
        torch.optim.SGD,
        model=model,
        lr=0.0,
    )
    modifier: Any = engine.modifiers[0]
    mask = masks_of(engine)["0.weight"]
    free = (~mask).nonzero()
    sizes = [  # what two of the free places get in steps 1 to 3: the first step does not count
        (100.0, 0.0),
        (1.0, 1.5),
        (-1.0, 0.0),
    ]
    for first, second in sizes:
        model[0].weight.grad = torch.zeros(2, 4)
        model[0].weight.grad[tuple(free[0])], model[0].weight.grad[tuple(free[1])] = first, second
        optimizer.step()
    new = masks_of(engine)["0.weight"]
    assert bool(new[tuple(free[0])])
    assert not bool(new[tuple(free[1])])
    assert not modifier._gains


def test_what_was_ever_active_is_told() -> None:
    model, optimizer, engine = started("every: 4st, sparsity: 0.75")
    ever = masks_of(engine)["0.weight"]
    shares = {0: 0.25}
    for step in range(1, STEPS + 1):
        plain(model, optimizer)
        ever |= masks_of(engine)["0.weight"]
        if step in (4, 8, 12, 16):
            shares[step] = float(ever.sum()) / 128
    told = {step: value for step, name, value in engine.run.history if name == "svite/ever_active"}
    assert told == shares
    assert shares[16] > 0.3
    assert [value for _, name, value in engine.run.history if name == "svite/sparsity"] == [0.75]
