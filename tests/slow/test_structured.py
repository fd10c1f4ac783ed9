"""Which heads are pruned matters: ranked by Taylor against at random, on a vision transformer trained on the digits."""

import copy
from functools import cache

import pytest
import torch
from torch import nn

from ovit_engine import Engine, Recipe
from tests.slow.digits import accuracy, images, trained_vit

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)
DRAWS = 4  # of random heads, for each model
STEPS = 10


@cache
def trained(seed: int) -> nn.Module:
    return trained_vit(seed)


def pruned(model: nn.Module, options: str) -> float:
    """Accuracy after one pruning step and no training: the steps before it have a learning rate of zero."""
    model = copy.deepcopy(model)
    recipe = Recipe.parse(f"modifiers: [structured_prune: {{start: {STEPS}st, {options}}}]")
    engine = Engine(model, recipe, steps_per_epoch=STEPS, epochs=1).prepare()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    engine.attach(optimizer)
    x, y = images()[0].tensors
    model.train()
    for batch in torch.arange(len(x)).split(len(x) // STEPS)[:STEPS]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    engine.detach()
    return accuracy(model)


def mean_accuracy(options: str, score: str) -> float:
    """Over the seeds, and for random scores over several draws."""
    ways = [f"seed: {draw}" for draw in range(DRAWS)] if score == "random" else [f"gradients: {STEPS}"]
    found = [pruned(trained(s), f"{options}, score: {score}, {way}") for s in SEEDS for way in ways]
    print(f"{options} {score}: {sum(found) / len(found):.4f}, {[round(each, 3) for each in found]}")
    return sum(found) / len(found)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_taylor_chooses_better_heads_than_chance(scope: str) -> None:
    options = f"head_sparsity: 0.5, scope: {scope}"
    assert mean_accuracy(options, "taylor") > mean_accuracy(options, "random") + 0.05
