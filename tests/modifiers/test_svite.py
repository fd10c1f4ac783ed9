"""SViTE: sparse from the first step on, connections move by the published rules, and nothing else does."""

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from ovit_engine import Clock, Engine, RecipeError
from ovit_engine.second_order.erk import share_out
from ovit_engine.verify_resume import differences
from tests.loops import X, Y, closure, mlp, plain, recipe
from tests.test_topology import searched

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
    kept = share_out([mask.shape for mask in masks.values()], sizes, sum(sizes) - round(0.6 * sum(sizes)))
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


# --- loops


def test_a_step_that_overflows_changes_nothing() -> None:
    """U10."""
    for fused in (False, True):
        model, optimizer, engine = started(
            "every: 2st, sparsity: 0.5", lambda p, lr, fused=fused: torch.optim.AdamW(p, lr, fused=fused)
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        applied = 0
        for number in range(8):
            overflows = number in (1, 4)
            before = (copy.deepcopy(model.state_dict()), masks_of(engine), engine.run.step)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(X), Y)
            scaler.scale(loss * (math.inf if overflows else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            if overflows:
                assert engine.run.step == before[2]
                assert masks_of(engine)["0.weight"].equal(before[1]["0.weight"])
                assert model[0].weight.equal(before[0]["0.weight"])
            else:
                applied += 1
                expected = applied % 2 == 0
                assert masks_of(engine)["0.weight"].equal(before[1]["0.weight"]) != expected
            assert bool(model[0].weight.isfinite().all())


def test_a_loss_scale_does_not_matter() -> None:
    """Gradients over two steps are those of the loss, though the scale changes in between."""
    masks = []
    for scales in ((1.0, 1.0), (1.0, 2.0**12)):
        model, optimizer, engine = started(
            "every: 2st, gradients: 2, sparsity: 0.5", lambda p, lr: torch.optim.AdamW(p, lr, fused=True)
        )
        for scale in scales:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(X), Y)).backward()
            scaler.step(optimizer)
        masks.append(masks_of(engine)["0.weight"])
    assert masks[0].equal(masks[1])


def test_accumulation_is_a_larger_batch() -> None:
    """U11."""
    found = []
    for parts in (1, 4):
        model, optimizer, engine = started("every: 3st, sparsity: 0.5", torch.optim.SGD)
        for _ in range(STEPS):
            optimizer.zero_grad()
            for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
                (nn.functional.mse_loss(model(x), y) / parts).backward()
            optimizer.step()
        found.append(masks_of(engine)["0.weight"])
    assert found[0].equal(found[1])


def test_an_average_is_as_sparse() -> None:
    """U12: what was dropped leaves the averaged copy at once."""
    model = mlp()
    ema = ModelEmaV3(model, decay=0.99)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    text = "svite: {every: 2st, end: 100%, sparsity: 0.5, targets: [0.weight]}"
    engine = Engine(model, recipe(text), steps_per_epoch=STEPS, epochs=1).attach(optimizer, ema=ema)
    for _ in range(STEPS):
        plain(model, optimizer)
        assert not ema.module[0].weight[~masks_of(engine)["0.weight"]].any()
        ema.update(model)
    engine.detach()
    assert int((ema.module[0].weight == 0).sum()) >= int((model[0].weight == 0).sum()) == 64


def test_a_closure_sees_sparse_weights_and_gives_dense_gradients() -> None:
    model, optimizer, engine = started("every: 2st, sparsity: 0.5", torch.optim.SGD)
    starts = masks_of(engine)["0.weight"]
    for _ in range(4):
        before = masks_of(engine)["0.weight"]
        closure(model, optimizer)
        assert not model[0].weight[~(before & masks_of(engine)["0.weight"])].any()
    assert not masks_of(engine)["0.weight"].equal(starts)


# --- states


class Training:
    """All that a script makes anew when it starts again; 160 steps."""

    def __init__(self, options: str) -> None:
        self.model = mlp()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)
        text = f"svite: {{targets: ['re:.*weight'], {options}}}"
        self.engine = Engine(self.model, recipe(text), steps_per_epoch=16, epochs=10)

    def train(self, steps: int) -> "Training":
        self.engine.attach(self.optimizer)
        for _ in range(steps):
            batch = torch.randint(64, (16,))
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(X[batch]), Y[batch]).backward()
            self.optimizer.step()
        return self

    @property
    def parts(self) -> list[Any]:
        return [self.engine, self.model, self.optimizer]


@pytest.mark.parametrize("cut", [137, 138])
@pytest.mark.parametrize("grow", ["grow: gradient, gradients: 3", "grow: random"])
def test_a_run_that_was_broken_off_goes_on_bit_for_bit(cut: int, grow: str) -> None:
    """U8: between two updates, and inside of the steps whose gradients count."""
    options = f"every: 10st, end: 150st, sparsity: 0.5, {grow}"
    torch.manual_seed(5)
    whole = Training(options).train(160)
    torch.manual_seed(5)
    first = Training(options).train(cut)
    file = io.BytesIO()
    torch.save([*(part.state_dict() for part in first.parts), torch.get_rng_state()], file)
    *states, random = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert bool(states[0]["modifiers"][0]["gains"]) == (cut == 138 and "gradients" in grow)
    again = Training(options)
    for part, state in zip(again.parts, states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    again.train(160 - cut)
    ends = [[part.state_dict() for part in each.parts] for each in (whole, again, first)]
    assert not list(differences(ends[0], ends[1]))
    assert list(differences(ends[0], ends[2]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gains": {"0.weight": torch.zeros(2, 2)}}, r"gradients of '0.weight' \[2, 2\] fit no target here"),
        ({"gains": {"nope": torch.zeros(2, 2)}}, "gradients of 'nope'"),
        ({"ever": {"nope": {}}}, "the checkpoint's record of 'nope' fits no target here"),
        ({"ever": {"0.weight": {}}}, "mask of '0.weight' is damaged: it has no shape and bits"),
        ({"ever": {"0.weight": {"shape": [1], "bits": torch.zeros(1)}}}, r"mask of '0.weight' is \[1\], the weight"),
    ],
)
def test_a_state_of_something_else_is_refused(change: dict[str, Any], words: str) -> None:
    model, optimizer, engine = started("every: 4st, sparsity: 0.5")
    plain(model, optimizer)
    state = engine.state_dict()
    state["modifiers"][0] |= change
    fresh = Engine(mlp(), engine.recipe, steps_per_epoch=STEPS, epochs=1)
    with pytest.raises(ValueError, match=words):
        fresh.load_state_dict(state)


def test_a_training_that_is_far_too_short_is_told() -> None:
    model, optimizer, engine = started("every: 4st, sparsity: 0.5")
    for _ in range(13):
        plain(model, optimizer)
    with pytest.raises(RuntimeError, match="svite: training ended before the last update at step 16"):
        engine.detach()


def test_updates_that_skipped_steps_left_out_are_not_made_up_for() -> None:
    """A connection that came after the last step would stay zero."""
    model, optimizer, engine = started("every: 1st, end: 100%, sparsity: 0.5, drop_end: 0.4")
    for _ in range(STEPS - 1):
        plain(model, optimizer)
    engine.modifiers[0]._done -= 1  # type: ignore[attr-defined]
    before = masks_of(engine)["0.weight"]
    engine.detach()
    assert masks_of(engine)["0.weight"].equal(before)


# --- what is refused

ERRORS = [
    ("every: 0.01ep", "svite.every: '0.01ep' is less than a step of 24 steps an epoch"),
    ("every: 20st", "svite.every: no update comes before the end at '80%', step 19: update more often"),
    ("every: 2st, end: 3ep", "svite.end: '3ep' is step 72, past the end of training at step 24"),
    ("every: 2st, gradients: 3", "svite.gradients: 3 gradients are more than the 2 steps between updates"),
    ("every: 2st, drop: 0.1, drop_end: 0.2", "svite: the share that moves falls: 'drop' is 0.1, 'drop_end' 0.2"),
    ("every: 2st, drop: 1.5", "svite.drop"),
    ("every: 2st, grow: random, gradients: 2", "svite: 'gradients' does not go with 'grow: random', which takes none"),
    ("every: 2st, grow: magic", "svite.grow"),
    ("every: 2st, init: magnitude, seed: 1", "svite: 'seed' does not go with 'init: magnitude' and 'grow: gradient'"),
    ("every: 2st, pattern: '1:4'", "svite: pattern 1:4 is a sparsity of 0.75: sparsity 0.5 contradicts it"),
    ("end: 2ep", "svite"),
]


@pytest.mark.parametrize(("options", "words"), ERRORS)
def test_options_that_make_no_sense(options: str, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"^r.yaml:2:\d+: {words}") as raised:
        started(f"sparsity: 0.5, {options}")
    assert "\n" not in str(raised.value)


def test_a_frozen_weight_can_only_grow_at_random() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    with pytest.raises(RecipeError, match=r"^r.yaml:2:\d+: svite.targets: '0.weight' is frozen, so there is no grad"):
        started("every: 2st, sparsity: 0.5", model=model)
    _, optimizer, engine = started("every: 2st, sparsity: 0.5, grow: random", model=copy.deepcopy(model))
    before = masks_of(engine)["0.weight"]
    for _ in range(2):
        plain(engine.model, optimizer)
    assert not masks_of(engine)["0.weight"].equal(before)


def test_a_loss_that_is_nan_is_an_error_and_no_topology() -> None:
    model, optimizer, engine = started("every: 2st, sparsity: 0.5", torch.optim.SGD)
    plain(model, optimizer)
    before = masks_of(engine)["0.weight"]
    with torch.no_grad():
        model[2].weight[0, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"^0\.weight: a weight is NaN"):
        plain(model, optimizer)
    assert masks_of(engine)["0.weight"].equal(before)


def engine_of(*modifiers: str) -> Engine:
    return Engine(mlp(), recipe(*modifiers), steps_per_epoch=10, epochs=10).prepare()


SVITE = "svite: {every: 10st, end: 50st, sparsity: 0.5, targets: [0.weight]}"


@pytest.mark.parametrize("first", [True, False])
def test_quantization_waits_for_the_last_update(first: bool) -> None:
    """§11: the topology is fixed before weights are rounded."""
    both = [SVITE, "quantize: {start: 3ep, targets: ['0']}"]
    what = "the quantization of 0 from step "
    words = (
        rf"^r.yaml:3:\d+: quantize: {what}30 to 100 does not go with svite \(r.yaml:2:\d+\) from 0 to 40: what is"
        if first
        else rf"^r.yaml:3:\d+: svite: {what}0 to 40 does not go with quantize \(r.yaml:2:\d+\) from 30 to 100: what is"
    )
    with pytest.raises(RecipeError, match=f"{words} rounded must be what is deployed, so quantize after the last"):
        engine_of(*(both if first else both[::-1]))
    engine_of(SVITE, "quantize: {start: 3ep, targets: ['2']}")  # another layer
    engine_of(SVITE, "quantize: {start: 5ep, targets: ['0']}")


@pytest.mark.parametrize(
    "other",
    ["magnitude_prune: {start: 4ep, sparsity: 0.75, targets: [0.weight]}", "constant_mask: {targets: [0.weight]}"],
)
def test_another_writer_of_its_masks_is_refused(other: str) -> None:
    with pytest.raises(
        RecipeError, match=r"writes the mask of 0.weight .* svite \(r.yaml:2:\d+\) writes it from 0 to 40"
    ):
        engine_of(SVITE, other)
    engine_of(SVITE, other.replace("0.weight", "2.weight"))


def test_pruning_may_go_on_where_it_ended() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    text = [SVITE, "magnitude_prune: {start: 8ep, sparsity: 0.75, targets: [0.weight]}"]
    with Engine(model, recipe(*text), steps_per_epoch=10, epochs=10).attach(optimizer):
        for _ in range(100):
            plain(model, optimizer)
    assert int((model[0].weight == 0).sum()) == 96


def test_its_file_holds_what_it_promises(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    text = [SVITE, "quantize: {start: 50st, targets: ['0']}"]
    with Engine(model, recipe(*text), steps_per_epoch=10, epochs=10).attach(optimizer) as engine:
        for _ in range(100):
            plain(model, optimizer)
    certificate = engine.export(tmp_path / "model.onnx", X[:2])
    (layer,) = [layer for layer in certificate.layers if layer.name == "0.weight"]
    assert layer.sparsity >= 0.5
    assert layer.quantized
