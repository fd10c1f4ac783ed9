"""The mathematics by hand, and a short training."""

import pytest
import torch
from ovit_plugin_example import relative_importance, rescale_rows
from torch import nn

from ovit_engine import Engine, Recipe


def test_importance_is_a_share_of_row_and_column() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.0, 1.0]])
    assert relative_importance(weight).tolist() == [[1 / 4 + 1, 3 / 4 + 3 / 4], [0, 1 + 1 / 4]]


def test_a_column_of_zeros_scores_zero() -> None:
    assert relative_importance(torch.tensor([[0.0, 2.0]])).tolist() == [[0, 2]]


def test_rows_get_their_norm_back() -> None:
    weight, pruned = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    assert rescale_rows(weight, pruned, 1.0).tolist() == [[0, 5], [0, 0]]
    assert rescale_rows(weight, pruned, 0.0).tolist() == pruned.tolist()


@pytest.mark.parametrize("name", ["ria_prune", "ria_rescale_prune"])
@pytest.mark.parametrize(
    ("options", "zeros"),
    [
        ("start: 1st, sparsity: 0.75", 96),
        ("start: 1st, pattern: '2:4'", 64),
        ("start: 1st, end: 3st, every: 1st, sparsity: {from: 0.2, to: 0.5}, pattern: {block: [1, 4]}", 64),
    ],
)
def test_zeros_are_exact_after_training(name: str, options: str, zeros: int) -> None:
    torch.manual_seed(0)
    pruned = nn.Linear(16, 8)
    model = nn.Sequential(pruned, nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe.parse(f"modifiers: [{{{name}: {{targets: [0.weight], {options}}}}}]")
    engine = Engine(model, recipe, steps_per_epoch=4, epochs=1)
    engine.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    engine.detach()
    assert int(torch.count_nonzero(pruned.weight == 0)) == zeros
