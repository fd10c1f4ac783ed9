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

EPOCHS, RATE = 20, 2e-3
LINES = {
    "dynamic_vit": "dynamic_vit: {keep: 0.7, backbone_lr_scale: 0.2, freeze: 2ep}",
    "svite_tokens": "svite_tokens: {keep: 0.7}",
}


def reduced(dense: nn.Module, line: str, seed: int) -> nn.Module:
    """The dense model after some epochs with fewer tokens."""
    model = copy.deepcopy(dense)
    x, y = images()[0].tensors
    steps = len(x) // BATCH
    engine = Engine(model, Recipe.parse(f"modifiers:\n  - {line}"), steps_per_epoch=steps, epochs=EPOCHS).prepare()
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * EPOCHS)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with engine.attach(optimizer):
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(x), generator=generator).split(BATCH)[:steps]:
                optimizer.zero_grad()
                noisy = x[batch] + NOISE * torch.randn(len(batch), 1, 8, 8, generator=generator)
                engine.loss(cross_entropy(model(noisy), y[batch])).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return model


@pytest.mark.slow
def test_seven_tenths_of_the_tokens_are_enough() -> None:
    example = images()[1][:1]
    found: dict[str, list[float]] = {name: [] for name in ("dense", *LINES)}
    for seed in (0, 1, 2):
        dense = trained_vit(seed)
        found["dense"].append(accuracy(dense))
        for name, line in LINES.items():
            model = reduced(dense, line, seed)
            found[name].append(accuracy(model))
            saved = 1 - count_flops(model, example).dense / count_flops(dense, example).dense
            print(f"seed {seed}: {name} {found[name][-1]:.4f}, dense {found['dense'][-1]:.4f}, MACs saved {saved:.1%}")
            assert saved > 0.2
    mean = {name: statistics.mean(values) for name, values in found.items()}
    print(mean)
    assert mean["dynamic_vit"] >= mean["dense"] - 0.01
