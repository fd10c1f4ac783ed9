"""Movement: what training moves towards zero goes first."""

from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import Engine, RecipeError
from tests.loops import X, Y, mlp, plain, recipe, zeros


class Quadratic(nn.Module):
    """Loss 1/2 sum a w^2, gradient a w."""

    def __init__(self, weights: list[list[float]], curvature: list[list[float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights))
        self.curvature = torch.tensor(curvature)

    def forward(self) -> torch.Tensor:
        return (self.curvature * self.weight**2).sum() / 2


def started(model: nn.Module, options: str, targets: str = "weight", lr: float = 0.1) -> tuple[Any, Any, Engine]:
    optimizer = torch.optim.SGD(model.parameters(), lr)
    engine = Engine(model, recipe(f"movement_prune: {{targets: [{targets}], {options}}}"), steps_per_epoch=6, epochs=1)
    engine.attach(optimizer)
    return model, optimizer, engine


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model().backward()
    optimizer.step()


def test_one_step_on_a_parabola_scores_minus_a_w_squared() -> None:
    model, optimizer, engine = started(
        Quadratic([[1.0, 2.0], [-3.0, 0.5]], [[4.0, 2.0], [0.1, -1.0]]), "sparsity: 0.5, start: 1st"
    )
    step(model, optimizer)
    modifier: Any = engine.modifiers[0]
    torch.testing.assert_close(modifier._scores["weight"], torch.tensor([[-4.0, -8.0], [-0.9, 0.25]]))
    assert (model.weight == 0).tolist() == [[True, True], [False, False]]  # -3 hardly moves, 0.5 grows


def test_scores_add_up_over_steps_and_pruning_steps() -> None:
    model, optimizer, engine = started(mlp(), "sparsity: {2st: 0.25, 4st: 0.5}", targets="0.weight, 2.weight")
    expected = {"0.weight": torch.zeros(16, 8), "2.weight": torch.zeros(1, 16)}
    for count in range(1, 7):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), Y).backward()
        if count <= 4:  # nothing is gathered after the last pruning step
            for name, score in expected.items():
                weight = model.get_parameter(name)
                score -= weight.detach() * weight.grad
        before = {name: model.get_parameter(name) == 0 for name in expected}
        optimizer.step()
        if count in (2, 4):
            scores = torch.cat([expected[name].masked_fill(before[name], -1e9).flatten() for name in expected])
            lowest = scores.argsort()[: round(144 * count / 8)]
            found = torch.cat([(model.get_parameter(name) == 0).flatten() for name in expected])
            assert sorted(found.nonzero().flatten().tolist()) == sorted(lowest.tolist())
    modifier: Any = engine.modifiers[0]
    for name, score in expected.items():
        torch.testing.assert_close(modifier._scores[name], score)
    engine.detach()


@pytest.mark.parametrize(
    ("pattern", "count"), [("pattern: '2:4'", 64), ("pattern: {block: [1, 4]}, sparsity: 0.25", 32)]
)
def test_patterns(pattern: str, count: int) -> None:
    model, optimizer, _ = started(mlp(), f"{pattern}, start: 2st", targets="0.weight")
    for _ in range(2):
        plain(model, optimizer)
    assert zeros(model[0]) == count


def test_it_goes_on_from_its_state() -> None:
    model, optimizer, engine = started(mlp(), "sparsity: 0.5, start: 3st", targets="0.weight")
    plain(model, optimizer)
    other = mlp(seed=1)
    fresh = Engine(other, engine.recipe, steps_per_epoch=6, epochs=1)
    fresh.load_state_dict(engine.state_dict())
    modifier: Any = engine.modifiers[0]
    restored: Any = fresh.modifiers[0]
    assert restored._scores["0.weight"].equal(modifier._scores["0.weight"])
    state = engine.state_dict()["modifiers"][0]["scores"]["0.weight"]
    plain(model, optimizer)
    assert not restored._scores["0.weight"].equal(modifier._scores["0.weight"])
    assert restored._scores["0.weight"].equal(state)  # copies both


def test_what_was_pruned_stays_pruned_whatever_its_score() -> None:
    model, optimizer, engine = started(mlp(), "sparsity: {1st: 0.25, 3st: 0.5}", targets="0.weight")
    plain(model, optimizer)
    gone = model[0].weight == 0
    modifier: Any = engine.modifiers[0]
    modifier._scores["0.weight"][gone] = 1e9
    plain(model, optimizer)
    plain(model, optimizer)
    assert bool((model[0].weight == 0)[gone].all())
    assert zeros(model[0]) == 64


def test_there_is_nothing_to_prune_by_at_step_0() -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:2:\d+: movement_prune.start: at step 0 nothing has moved yet"):
        started(mlp(), "sparsity: 0.5", targets="0.weight")
    with pytest.raises(RecipeError, match=r"movement_prune.sparsity: at step 0 nothing has moved yet"):
        started(mlp(), "sparsity: {0ep: 0.5}", targets="0.weight")


def test_a_frozen_weight_is_an_error() -> None:
    model, optimizer, _ = started(mlp(), "sparsity: 0.5, start: 2st", targets="0.weight")
    model[0].weight.requires_grad_(False)
    with pytest.raises(RecipeError, match=r"movement_prune.targets: '0\.weight' gets no gradient"):
        plain(model, optimizer)


def test_half_a_state_is_refused() -> None:
    model, optimizer, engine = started(mlp(), "sparsity: 0.5, start: 3st", targets="re:.*weight")
    plain(model, optimizer)
    for lost in (["0.weight"], ["0.weight", "2.weight"]):
        state = engine.state_dict()
        for name in lost:
            del state["modifiers"][0]["scores"][name]
        fresh = Engine(mlp(), engine.recipe, steps_per_epoch=6, epochs=1)
        with pytest.raises(ValueError, match=r"half a state: the checkpoint has no scores of '0\.weight'"):
            fresh.load_state_dict(state)


def test_a_state_from_before_the_first_step_is_whole() -> None:
    _, _, engine = started(mlp(), "sparsity: 0.5, start: 2st", targets="0.weight")
    model = mlp()
    fresh = Engine(model, engine.recipe, steps_per_epoch=6, epochs=1)
    fresh.load_state_dict(engine.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fresh.attach(optimizer)
    for _ in range(2):
        plain(model, optimizer)
    assert zeros(model[0]) == 64
