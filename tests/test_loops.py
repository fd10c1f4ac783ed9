"""One recipe, every kind of loop: no loop changes a line for us."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from ovit_engine import Calibration, Engine, Recipe
from tests.loops import (
    PRUNE,
    Spy,
    X,
    Y,
    accumulate,
    closure,
    closure_by_keyword,
    hooks_on,
    loss_of,
    mlp,
    plain,
    recipe,
    zeros,
    zeros_at,
)

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9, centered=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.5, max_iter=4),
}


@pytest.mark.parametrize("step", [plain, accumulate, closure, closure_by_keyword])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_forward_sees_the_masks(name: str, step: Callable[..., None]) -> None:
    if name == "lbfgs" and step in (plain, accumulate):
        pytest.skip("LBFGS needs a closure")
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    engine = Engine(model, recipe(PRUNE), steps_per_epoch=10, epochs=4).attach(optimizer)
    seen: list[tuple[int, int]] = []
    model[0].register_forward_pre_hook(lambda module, _: seen.append((engine.run.step, zeros(module))))
    for count in range(1, 41):
        step(model, optimizer)
        assert (engine.run.step, zeros(model[0])) == (count, zeros_at(count))
    engine.detach()
    assert seen == [(step, zeros_at(step)) for step, _ in seen]
    assert len(seen) >= 40
    assert zeros(model[0]) == 64
    assert zeros(model[2]) == 0
    assert not bool(torch.signbit(model[0].weight[model[0].weight == 0]).any())
    assert engine.finished


def test_the_line_search_of_lbfgs_does_not_see_masked_directions() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=4)
    Engine(model, recipe(PRUNE), steps_per_epoch=10, epochs=4).attach(optimizer)
    for _ in range(40):
        closure(model, optimizer)
    flat = optimizer.state[model[0].weight]["prev_flat_grad"][:128]
    assert bool((flat[model[0].weight.flatten() == 0] == 0).all())
    assert bool((flat[model[0].weight.flatten() != 0] != 0).all())


def test_events_of_a_plain_loop_in_order() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = Engine(model, Recipe("spied", (Spy(),)), steps_per_epoch=2, epochs=1)
    engine.prepare().attach(optimizer)
    for _ in range(2):
        accumulate(model, optimizer)
    engine.detach()
    assert engine.modifiers[0]._seen == [  # type: ignore[attr-defined]
        ("prepare", 0),
        ("attach", 0),
        *[("write_rates", 0), ("step_begin", 0), ("step_end", 1)],
        *[("write_rates", 1), ("step_begin", 1), ("step_end", 2)],
        ("detach", 2),
    ]


def test_a_closure_runs_after_the_rates_and_before_step_begin_which_sees_dense_gradients() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
    both = Recipe("spied", (*recipe("magnitude_prune: {sparsity: 0.5, targets: [0.weight]}").modifiers, Spy()))
    engine = Engine(model, both, steps_per_epoch=2, epochs=1).attach(optimizer)
    order: list[tuple[str, int]] = engine.modifiers[1]._seen  # type: ignore[attr-defined]

    def evaluate() -> Any:
        order.append(("closure", engine.run.step))
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(evaluate)
    steps = [kind for kind, _ in order if kind != "closure"]
    assert steps == ["prepare", "attach"] + 2 * ["write_rates", "step_begin", "step_end"]
    first = order.index(("write_rates", 0))
    assert order[first : first + 4] == [("write_rates", 0), ("closure", 0), ("step_begin", 0), ("closure", 0)]
    assert all(bool((g[model[0].weight == 0] != 0).all()) for g in engine.modifiers[1]._gradients)  # type: ignore[attr-defined]


def test_the_value_of_the_closure_and_its_grad_mode_are_the_users() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Engine(model, recipe(), steps_per_epoch=9, epochs=1).attach(optimizer)
    modes = []

    def evaluate() -> Any:
        modes.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    expected = loss_of(model).item()
    assert optimizer.step(evaluate).item() == expected  # type: ignore[attr-defined]
    assert modes == [True]


def test_arguments_of_step_beside_the_closure_arrive() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None, factor: int = 1, *, flag: bool = False) -> Any:
            self.got = (factor, flag)
            return super().step(closure)

    model = mlp()
    optimizer = Odd(model.parameters(), 0.1)
    Engine(model, recipe(), steps_per_epoch=9, epochs=1).attach(optimizer)
    for call in (lambda c: optimizer.step(c, 3, flag=True), lambda c: optimizer.step(closure=c, factor=3, flag=True)):
        call(lambda: loss_of(model).backward())
        assert optimizer.got == (3, True)


def test_a_subclass_that_calls_super_step_ticks_once() -> None:
    """Torch hooks `step` in each class of which an instance was made, so the hooks of one optimizer can nest."""

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = mlp()
    torch.optim.SGD(model.parameters(), 0.1)
    optimizer = Own(model.parameters(), 0.1, momentum=0.9)
    engine = Engine(model, recipe(PRUNE), steps_per_epoch=10, epochs=4).attach(optimizer)
    for step in [plain] * 20 + [closure] * 20:
        step(model, optimizer)
    assert engine.run.step == 40
    engine.detach()


@pytest.mark.parametrize("unscaled", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_a_skipped_step_does_not_move_the_clock(fused: bool, unscaled: bool) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
    recipes = Recipe("spied", (*recipe(PRUNE).modifiers, Spy()))
    engine = Engine(model, recipes, steps_per_epoch=9, epochs=4).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    applied = 0
    for i in range(40):
        skip = i % 10 == 3
        before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * (float("inf") if skip else 1)).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        applied += not skip
        assert engine.run.step == applied
        assert zeros(model[0]) == zeros_at(applied)
        assert torch.equal(model[0].weight, before) == skip
    engine.detach()
    assert zeros(model[0]) == 64
    steps = [kind for kind, _ in engine.modifiers[1]._seen]  # type: ignore[attr-defined]
    assert [steps.count(kind) for kind in ("write_rates", "step_begin", "step_end")] == [36, 36, 36]


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_gradients_at_step_begin_are_unscaled(fused: bool) -> None:
    model = mlp()
    (expected,) = torch.autograd.grad(loss_of(model), [model[0].weight])
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
    engine = Engine(model, Recipe("spied", (Spy(),)), steps_per_epoch=9, epochs=1).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(engine.modifiers[0]._gradients[0], expected)  # type: ignore[attr-defined]
    plain(model, optimizer)  # and a step without the scaler is not divided by the last scale
    assert model[0].weight.grad is not None
    assert torch.equal(engine.modifiers[0]._gradients[1], model[0].weight.grad)  # type: ignore[attr-defined]


@pytest.mark.parametrize("clock_first", [True, False])
def test_of_several_optimizers_one_counts_and_all_hold_the_masks(clock_first: bool) -> None:
    model = mlp()
    clock = torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9)
    other = torch.optim.AdamW(model[2].parameters(), 0.1)
    prune = "magnitude_prune: {start: 2st, sparsity: 0.5, targets: [0.weight, 2.weight], scope: layer}"
    engine = Engine(model, recipe(prune), steps_per_epoch=9, epochs=1).attach(clock, other)
    order = [clock, other] if clock_first else [other, clock]
    for count in range(1, 10):
        model.zero_grad()
        loss_of(model).backward()
        for optimizer in order:
            optimizer.step()
            if count > 2:
                assert (zeros(model[0]), zeros(model[2])) == (64, 8)
        assert engine.run.step == count
    engine.detach()
    assert hooks_on(clock) == hooks_on(other) == 0


def test_a_compiled_model_sees_the_masks() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    engine = Engine(model, recipe(PRUNE), steps_per_epoch=10, epochs=4).attach(optimizer)
    compiled: Any = torch.compile(model, backend="eager")
    for count in range(1, 41):
        plain(compiled, optimizer)
        assert zeros(model[0]) == zeros_at(count)
        if count % 10 == 0:
            torch.testing.assert_close(compiled(X), model(X))
    engine.detach()


def test_an_engine_on_a_compiled_model_finds_the_weights_by_their_own_names() -> None:
    inner = mlp()
    model: Any = torch.compile(inner, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = Engine(model, recipe(PRUNE), steps_per_epoch=10, epochs=4).attach(optimizer)
    for _ in range(40):
        plain(model, optimizer)
    engine.detach()
    assert engine.run.masks.names() == ["0.weight"]
    assert zeros(inner[0]) == 64


def test_an_optimizer_that_loads_its_state_keeps_the_engine() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    engine = Engine(model, recipe(PRUNE), steps_per_epoch=10, epochs=4).attach(optimizer)
    for count in range(1, 41):
        plain(model, optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        assert engine.run.step == count
    assert zeros(model[0]) == 64


def train_with_dropout(engine_too: bool, *modifiers: str) -> tuple[Any, ...]:
    """Forty lines that any user could have written; the engine is three of them."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 1))
    data = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    engine = Engine(model, recipe(*modifiers), steps_per_epoch=len(loader), epochs=3)
    if engine_too:
        engine.attach(optimizer, calibration=Calibration(loader, nn.functional.mse_loss))
    losses = []
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    if engine_too:
        engine.detach()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return losses, list(model.state_dict().values()), moments, torch.get_rng_state()


def test_an_empty_recipe_changes_no_bit() -> None:
    without, with_engine = train_with_dropout(False), train_with_dropout(True)
    assert without[0] == with_engine[0]
    for one, two in zip(without[1] + without[2], with_engine[1] + with_engine[2], strict=True):
        assert torch.equal(one, two)
    assert torch.equal(without[3], with_engine[3])


def test_calibration_in_the_middle_leaves_dropout_order_and_statistics_alone() -> None:
    prune = (
        "ovit_prune: {start: 5st, sparsity: 0.5, targets: [0.weight], block: 16, gradients: 6, images_per_gradient: 4}"
    )
    without, pruned = train_with_dropout(False), train_with_dropout(True, prune)
    assert without[0][:5] == pruned[0][:5]
    assert without[0][5:] != pruned[0][5:]
    assert torch.equal(without[3], pruned[3])
