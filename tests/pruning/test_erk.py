"""The Erdos-Renyi-kernel rule: exact in all, denser where tensors are small, never more than there is."""

from typing import Any

import pytest
import torch
from cases import prune64, random_problem, zeros
from hypothesis import given, settings
from hypothesis import strategies as st

from ovit_engine.pruning import METHODS
from ovit_engine.pruning.problem import erk_counts

SHAPES = [(64, 64), (16, 16, 3, 3), (8, 8)]


def sizes(*shapes: tuple[int, ...]) -> list[torch.Size]:
    return [torch.Size(shape) for shape in shapes]


def test_densities_of_a_written_out_case() -> None:
    """Sums of dimensions 128, 38 and 16; 6464 weights of which 728 stay: 4 for each of the 182, all below the sizes."""
    assert erk_counts(sizes(*SHAPES), [4096, 2304, 64], 728) == [512, 152, 64]
    # twice as many: the last is full, the others share 1392 by 128 : 38, which is 1073.3 : 318.7
    assert erk_counts(sizes(*SHAPES), [4096, 2304, 64], 1456) == [1073, 319, 64]


def test_what_is_left_of_pruned_tensors_bounds_them() -> None:
    assert erk_counts(sizes(*SHAPES), [100, 2304, 64], 728) == [100, 564, 64]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=4), min_size=1, max_size=6),
    pruned=st.floats(0, 1),
    share=st.floats(0, 1),
)
def test_any_shapes(shapes: list[list[int]], pruned: float, share: float) -> None:
    everything = sizes(*map(tuple, shapes))  # type: ignore[arg-type]
    alive = [round(pruned * shape.numel()) for shape in everything]
    keep = round(share * sum(alive))
    kept = erk_counts(everything, alive, keep)
    assert sum(kept) == keep
    assert all(0 <= mine <= most for mine, most in zip(kept, alive, strict=True))
    rates = [mine / max(1, sum(shape)) for mine, shape in zip(kept, everything, strict=True)]
    for mine, most, rate, shape in zip(kept, alive, rates, everything, strict=True):
        if mine < most:  # who is not full keeps as much for its dimensions as anyone, but for rounding
            assert rate >= max(rates) - 2 / max(1, min(map(sum, everything))) - 1 / max(1, sum(shape))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_to_it_step_by_step(method: str) -> None:
    weights, gradients = random_problem((12, 12), (4, 4, 3, 1), (4, 4), seed=1)
    total, masks = 144 + 48 + 16, None
    for sparsity in (0.3, 0.6, 0.6, 0.9):
        options: Any = {"scope": "erk", "block": 16, "damp": 1e-2, "method": method, "masks": masks}
        new_masks, new = prune64(weights, gradients, sparsity=sparsity, **options)
        assert zeros(new_masks) == round(sparsity * total)
        alive = [int(mask.sum()) for mask in masks] if masks else [144, 48, 16]
        expected = erk_counts([w.shape for w in weights], alive, total - round(sparsity * total))
        assert [int(mask.sum()) for mask in new_masks] == expected
        if masks and sum(alive) == sum(expected):
            assert all(one.equal(other) for one, other in zip(new, weights, strict=True))
        weights, masks = new, new_masks
    assert masks is not None
    densities = [float(mask.double().mean()) for mask in masks]
    assert densities[0] < densities[1] < densities[2]


def test_tiles_are_counted_as_tiles() -> None:
    weights, gradients = random_problem((8, 8), (4, 4), seed=2)
    masks, _ = prune64(weights, gradients, scope="erk", pattern={"block": [1, 4]}, sparsity=0.5, block=16, damp=1e-2)
    assert [int(mask.sum()) for mask in masks] == [28, 12]  # 10 of 20 tiles by 16 : 8 is 6.7 : 3.3
