"""Invariant 20 (specs/second-order.md, section 5): what a schedule says is what is in the weights and the optimizer.

Tested elsewhere: single ranges and lists of times in tests/modifiers/test_pruning.py; cycles of the learning rate in
tests/modifiers/test_cyclic_lr.py and tests/core/test_schedule.py; zeros under momentum in tests/test_loops.py; EMA
copies in tests/test_engine.py; phases of AC/DC, which revive and reset, in tests/modifiers/test_acdc.py. Here: all at
once on the published schedule, and every range against its formula.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovit_engine import Clock, Engine
from tests.loops import mlp, plain, recipe, zeros

# Section 3, gradual ViT: 40 % at once, then a step every 20 of 300 epochs up to 90 % at 280.
TIMES, SPARSITIES = [0, 20, 40, 100, 280], [0.4, 0.5, 0.6, 0.75, 0.9]
TARGET = "targets: [0.weight]"
FIRST = 0.75 + 0.15 / 9  # at 120
PUBLISHED = [
    f"magnitude_prune: {{sparsity: {{0ep: 0.4, 20ep: 0.5, 40ep: 0.6}}, {TARGET}}}",
    f"magnitude_prune: {{start: 60ep, end: 100ep, every: 20ep, sparsity: {{from: 0.65, to: 0.75}}, {TARGET}}}",
    f"magnitude_prune: {{start: 120ep, end: 280ep, every: 20ep, sparsity: {{from: {FIRST}, to: 0.9}}, {TARGET}}}",
    "cyclic_lr: {max: 5.0e-4, min: 1.0e-5, period: 20ep}",
]


def test_20_the_published_gradual_schedule_from_recipe_to_weights() -> None:
    model = mlp()
    average: Any = torch.optim.swa_utils.AveragedModel(model)
    rates: list[float] = []

    class Noting(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.append(float(self.param_groups[0]["lr"]))
            return super().step(closure)

    optimizer = Noting(model.parameters(), 0.1)
    engine = Engine(model, recipe(*PUBLISHED), steps_per_epoch=1, epochs=300).attach(optimizer, ema=average)
    for step in range(301):
        pruned_at = 20 * (min(step, 280) // 20)
        expected = round(float(np.interp(pruned_at, TIMES, SPARSITIES)) * 128)
        assert zeros(model[0]) == expected
        if step == 300:
            break
        plain(model, optimizer)
        average.update_parameters(model)
        assert zeros(average.module[0]) >= zeros(model[0])
        assert rates[step] == pytest.approx(5e-4 - (5e-4 - 1e-5) * (step % 20) / 20)
        assert rates[step] > 1e-5
    engine.detach()
    assert all(rates[step] == 5e-4 for step in range(0, 300, 20))  # the first step after each pruning step
    assert zeros(model[0]) == zeros(average.module[0]) == round(0.9 * 128)


@settings(derandomize=True, max_examples=100)
@given(
    start=st.integers(0, 60),
    length=st.integers(0, 60),
    every=st.integers(1, 70),
    low=st.floats(0, 0.99),
    rise=st.floats(0, 1),
    curve=st.sampled_from(["linear", "cubic", "cosine", "constant"]),
)
def test_20_a_range_is_its_formula_at_every_step(
    start: int, length: int, every: int, low: float, rise: float, curve: str
) -> None:
    end, high = start + length, low + rise * (0.99 - low)
    text = f"{{start: {start}st, end: {end}st, every: {every}st, sparsity: {{from: {low}, to: {high}, curve: {curve}}}"
    pruner: Any = recipe(f"magnitude_prune: {text}, {TARGET}}}").modifiers[0]
    found = pruner.events(Clock(10, 120))
    times = list(found)
    assert times == sorted(set(times))
    assert set(times) == {t for t in range(start, end) if (t - start) % every == 0} | {end}
    for time, sparsity in found.items():
        x = (time - start) / length if length else 1.0
        shares = {"linear": x, "cubic": 1 - (1 - x) ** 3, "cosine": np.sin(np.pi * x / 2) ** 2, "constant": 1.0}
        assert sparsity == pytest.approx(low + (high - low) * shares[curve], abs=1e-12)
    values = list(found.values())
    assert values == sorted(values)
    assert values[-1] == pytest.approx(high, abs=1e-12)


@settings(derandomize=True, max_examples=20)
@given(counts=st.lists(st.integers(0, 127), min_size=2, max_size=5, unique=True).map(sorted), seed=st.integers(0, 99))
def test_20_momentum_never_moves_a_zero(counts: list[int], seed: int) -> None:
    """Optimizer buffers are full of the past when a weight goes; afterwards it is zero at every step."""
    model = mlp(seed)
    steps = ", ".join(f"{4 * (number + 1)}st: {count / 128}" for number, count in enumerate(counts))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.95, nesterov=True, weight_decay=0.01)
    text = f"magnitude_prune: {{sparsity: {{{steps}}}, {TARGET}}}"
    with Engine(model, recipe(text), steps_per_epoch=40, epochs=1).attach(optimizer):
        gone = torch.zeros_like(model[0].weight, dtype=torch.bool)
        for step in range(1, 41):
            plain(model, optimizer)
            reached = counts[min(step // 4, len(counts)) - 1] if step >= 4 else 0
            assert zeros(model[0]) == reached
            assert not bool((gone & (model[0].weight != 0)).any())
            gone |= model[0].weight.detach() == 0
