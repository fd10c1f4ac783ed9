"""The learning rate of a recipe: what is written, when, and who else may write."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ovit_engine import Clock, Engine, RecipeError
from tests.loops import closure, loss_of, mlp, plain, recipe


def rates(text: str, steps: int = 20, **optimizer_options: Any) -> list[float]:
    """The rate in the first group when each step is made, by an optimizer that writes it down."""

    class Noting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            noted.append(float(self.param_groups[0]["lr"]))
            return super().step(closure)

    noted: list[float] = []
    model = mlp()
    optimizer = Noting(model.parameters(), **{"lr": 0.3, **optimizer_options})
    with Engine(model, recipe(*text.split("\n")), steps_per_epoch=10, epochs=2).attach(optimizer):
        for _ in range(steps):
            plain(model, optimizer)
    return noted


def test_one_linear_cycle_is_equation_8_and_never_zero() -> None:
    found = rates("cyclic_lr: {max: 0.2, min: 0.01}")
    assert found == pytest.approx([0.2 - 0.19 * t / 20 for t in range(20)])
    assert min(found) > 0.01


def test_it_is_at_its_maximum_on_the_first_step_after_each_pruning_step() -> None:
    prune = "magnitude_prune: {start: 5st, end: 15st, every: 5st, sparsity: {from: 0.2, to: 0.5}, targets: [0.weight]}"
    found = rates(f"{prune}\ncyclic_lr: {{max: 0.2, min: 0.01, period: 5st}}")
    assert [step for step, rate in enumerate(found) if rate == 0.2] == [0, 5, 10, 15]
    falls = [one - two for step, (one, two) in enumerate(pairwise(found)) if (step + 1) % 5]
    assert falls == pytest.approx([0.19 / 5] * len(falls))  # no jump but the restart
    assert min(found) > 0.01


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ("cosine", [0.2, 0.2 - 0.1 * (1 - 0.5**0.5) / 2, 0.15, 0.2 - 0.1 * (1 + 0.5**0.5) / 2]),
        ("cubic", [0.1 + 0.1 * (1 - t / 4) ** 3 for t in range(4)]),
        ("constant", [0.2] * 4),
    ],
)
def test_other_curves(curve: str, expected: list[float]) -> None:
    assert rates(f"cyclic_lr: {{max: 0.2, min: 0.1, curve: {curve}, period: 4st}}")[:8] == pytest.approx(2 * expected)


def test_a_warm_up_rises_on_a_line_in_the_first_cycle_only() -> None:
    found = rates("cyclic_lr: {max: 0.2, min: 0.1, start: 2st, warmup: 4st, period: 9st}")
    cycle = [0.2 - 0.1 * t / 9 for t in range(9)]
    assert found[:2] == [0.3, 0.3]
    assert found[2:6] == pytest.approx([cycle[0] / 4, cycle[1] / 2, cycle[2] * 3 / 4, cycle[3]])
    assert found[6:11] == pytest.approx(cycle[4:])
    assert found[11:] == pytest.approx(cycle)


def test_outside_of_its_span_the_rate_is_the_users() -> None:
    found = rates("cyclic_lr: {max: 0.2, min: 0.1, start: 5st, end: 1ep}")
    assert found[:5] == [0.3] * 5
    assert found[5:10] == pytest.approx([0.2 - 0.1 * t / 5 for t in range(5)])
    assert found[10:] == [found[9]] * 10


def test_two_spans_follow_each_other() -> None:
    found = rates("cyclic_lr: {max: 0.2, min: 0.1, end: 1ep}\ncyclic_lr: {max: 0.05, min: 0.01, start: 1ep}")
    assert (found[0], found[10]) == (0.2, pytest.approx(0.05))
    assert found[10:] == pytest.approx([0.05 - 0.04 * t / 10 for t in range(10)])


def test_groups_and_optimizers_keep_their_ratios() -> None:
    model = mlp()
    one = torch.optim.SGD([{"params": [model[0].weight]}, {"params": [model[0].bias], "lr": 0.05}], lr=0.5)
    two = torch.optim.SGD(model[2].parameters(), 1.0)
    Engine(model, recipe("cyclic_lr: {max: 0.2, min: 0.1}"), steps_per_epoch=10, epochs=1).attach(one, two)
    for step in range(10):
        loss_of(model).backward()
        one.step()
        two.step()
        rate = 0.2 - 0.1 * step / 10
        found = [group["lr"] for optimizer in (one, two) for group in optimizer.param_groups]
        assert found == pytest.approx([rate, rate / 10, rate * 2])


def test_tensors_are_filled_in_place() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": torch.tensor(0.25)}]
    optimizer = torch.optim.SGD(groups, torch.tensor(0.5), foreach=False)
    Engine(model, recipe("cyclic_lr: {max: 0.2, min: 0.1}"), steps_per_epoch=10, epochs=1).attach(optimizer)
    held = [group["lr"] for group in optimizer.param_groups]
    for step in range(10):
        plain(model, optimizer)  # and no rival is seen in the rounding of float32
        assert all(isinstance(rate, Tensor) for rate in held)
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, held, strict=True))
        rate = 0.2 - 0.1 * step / 10
        assert [float(each) for each in held] == pytest.approx([rate, rate / 2])


def test_it_is_written_before_a_closure_runs() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.9, max_iter=2)
    Engine(model, recipe("cyclic_lr: {max: 0.2, min: 0.1}"), steps_per_epoch=10, epochs=1).attach(optimizer)
    seen: list[float] = []

    def evaluate() -> Any:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(evaluate)
    assert set(seen) == {0.2}
    closure(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.19)


def test_a_skipped_step_does_not_move_the_rate() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.3, fused=True)
    Engine(model, recipe("cyclic_lr: {max: 0.2, min: 0.1}"), steps_per_epoch=10, epochs=1).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    found = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([0.2, 0.2, 0.19])


def test_a_rival_scheduler_is_overruled_and_named_once() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    Engine(model, recipe("cyclic_lr: {max: 0.2, min: 0.1}"), steps_per_epoch=10, epochs=1).attach(optimizer)
    plain(model, optimizer)
    scheduler.step()
    with pytest.warns(UserWarning, match=r"something else changed the learning rate from 0\.2 to 0\.1 \(a scheduler"):
        plain(model, optimizer)
    for step in range(2, 10):  # a second warning would be an error
        scheduler.step()
        plain(model, optimizer)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 - 0.1 * step / 10)


def test_a_group_that_comes_later_keeps_the_ratio_it_comes_with() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), 0.4)
    Engine(model, recipe("cyclic_lr: {max: 0.2, min: 0.1}"), steps_per_epoch=10, epochs=1).attach(optimizer)
    plain(model, optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.1})
    for step in range(1, 10):  # and nobody is taken for a rival
        plain(model, optimizer)
        rate = 0.2 - 0.1 * step / 10
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, rate / 4])


def test_a_rate_of_zero_gives_no_ratio() -> None:
    model = mlp()
    engine = Engine(model, recipe("cyclic_lr: {max: 0.2, min: 0.1}"), steps_per_epoch=10, epochs=1)
    with pytest.raises(RecipeError, match=r"r.yaml:2:5: cyclic_lr: the optimizer's first group has learning rate 0"):
        engine.attach(torch.optim.SGD(model.parameters(), 0.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("period: 0.01ep", "cyclic_lr.period: '0.01ep' is less than a step of 10 steps an epoch"),
        ("start: 1ep, end: 1ep", "cyclic_lr.end: '1ep' does not come after the start at '1ep'"),
        ("end: 3ep", "cyclic_lr.end: '3ep' is step 30, past the end of training at step 20"),
        ("start: 3ep", "cyclic_lr"),
        ("warmup: 5st, period: 5st", "cyclic_lr.warmup: '5st' is not shorter than a cycle of 5 steps"),
        ("warmup: 1ep, end: 1ep, period: 2ep", "cyclic_lr.warmup: '1ep' is not shorter than a cycle of 10 steps"),
    ],
)
def test_times_that_make_no_cycle(options: str, words: str) -> None:
    text = f"cyclic_lr: {{max: 0.2, min: 0.1, {options}}}"
    with pytest.raises(RecipeError, match=rf"r.yaml:2:\d+: {words}"):
        Engine(mlp(), recipe(text), steps_per_epoch=10, epochs=2)


def test_the_timeline_names_each_cycle() -> None:
    (cyclic,) = recipe("cyclic_lr: {max: 0.2, min: 0.1, period: 5st}").modifiers
    engine = Engine(mlp(), recipe("cyclic_lr: {max: 0.2, min: 0.1, period: 5st}"), steps_per_epoch=10, epochs=2)
    rows = list(cyclic.timeline(engine.run.clock))
    assert [step for step, _, _ in rows] == [0, 5, 10, 15]
    assert rows[0][2] == "0.2 -> 0.12 (linear)"
    assert rows[3] == (15, "learning rate", "0.2 -> 0.12 (linear)")
    (constant,) = recipe("cyclic_lr: {max: 0.2, min: 0.2}").modifiers
    assert list(constant.timeline(engine.run.clock)) == [(0, "learning rate", "0.2")]


def test_the_timeline_tells_the_warm_up() -> None:
    (cyclic,) = recipe("cyclic_lr: {max: 0.2, min: 0.1, period: 10st, start: 2st, warmup: 5st}").modifiers
    rows = list(cyclic.timeline(Clock(10, 22)))
    assert [(step, value) for step, _, value in rows] == [
        (2, "0.04 -> 0.16 (warm-up)"),
        (7, "0.15 -> 0.11 (linear)"),
        (12, "0.2 -> 0.11 (linear)"),
    ]


def test_a_rival_of_another_group_is_named_by_its_own_rates() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.03}]
    optimizer = torch.optim.SGD(groups, 0.3)
    Engine(model, recipe("cyclic_lr: {max: 0.2, min: 0.1}"), steps_per_epoch=10, epochs=1).attach(optimizer)
    plain(model, optimizer)
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.warns(UserWarning, match=r"changed the learning rate from 0\.02 to 0\.5 \(a scheduler"):
        plain(model, optimizer)
