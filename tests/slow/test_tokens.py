"""Fewer tokens on a real if small vision transformer: how much accuracy that costs."""

import copy
import statistics

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ovit_engine import Engine, Recipe
from ovit_engine.flops import count_flops
from ovit_engine.tokens import param_groups
from tests.slow.digits import BATCH, NOISE, accuracy, images, trained_vit

EPOCHS, RATE = 30, 1e-3


def reduced(dense: nn.Module, line: str, seed: int, epochs: int = EPOCHS) -> nn.Module:
    """The dense model after some epochs with fewer tokens."""
    model = copy.deepcopy(dense)
    x, y = images()[0].tensors
    steps = len(x) // BATCH
    engine = Engine(model, Recipe.parse(f"modifiers:\n  - {line}"), steps_per_epoch=steps, epochs=epochs).prepare()
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps * epochs)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with engine.attach(optimizer):
        for _ in range(epochs):
            for batch in torch.randperm(len(x), generator=generator).split(BATCH)[:steps]:
                optimizer.zero_grad()
                noisy = x[batch] + NOISE * torch.randn(len(batch), 1, 8, 8, generator=generator)
                engine.loss(cross_entropy(model(noisy), y[batch])).backward()  # type: ignore[no-untyped-call]
                # a dropped token that attention wants has a gradient a hundred times that of the share that is kept;
                # Adam would remember it for hundreds of steps, and predictors stay where it threw them: all is kept
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
    return model


@pytest.mark.slow
def test_seven_tenths_of_the_tokens_are_enough() -> None:
    example = images()[1][:1]
    dense, fewer = [], []
    for seed in (0, 1, 2):
        model = trained_vit(seed)
        dense.append(accuracy(model))
        pruned = reduced(model, "dynamic_vit: {keep: 0.7}", seed)
        fewer.append(accuracy(pruned))
        saved = 1 - count_flops(pruned, example).dense / count_flops(model, example).dense
        print(f"seed {seed}: {fewer[-1]:.4f}, dense {dense[-1]:.4f}, operations saved {saved:.1%}")
        assert saved > 0.3
    print(f"mean {statistics.mean(fewer):.4f}, dense {statistics.mean(dense):.4f}")
    assert statistics.mean(fewer) >= statistics.mean(dense) - 0.01
