"""N:M: every group on the hardware axis ends with `keep` weights, at the least cost the pattern allows."""

from typing import Any

import pytest
import torch
from cases import prune64, random_problem, zeros

from ovit_engine.pruning import METHODS, prune_streamed

SHAPES = [(6, 8), (4, 8, 3, 2), (2, 4)]


def kept_by_group(mask: torch.Tensor, group: int) -> torch.Tensor:
    """Weights left in each group of consecutive input channels."""
    rows = mask.movedim(1, -1) if mask.ndim > 2 else mask
    return rows.reshape(-1, group).sum(1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (1, 2), (3, 4)])
@pytest.mark.parametrize("block", [4, 8, 20])
def test_14_every_group_has_exactly_keep(method: str, keep: int, group: int, block: int) -> None:
    weights, gradients = random_problem(*SHAPES)
    masks, updated = prune64(weights, gradients, method=method, pattern=f"{keep}:{group}", block=block)
    for mask, weight in zip(masks, updated, strict=True):
        assert (kept_by_group(mask, group) == keep).all()
        assert (weight == 0).equal(~mask)


@pytest.mark.parametrize("method", METHODS)
def test_14_what_was_pruned_is_counted(method: str) -> None:
    weights, gradients = random_problem(*SHAPES, seed=1)
    before = [torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.4 for shape in SHAPES]
    masks, updated = prune64(weights, gradients, method=method, pattern="2:4", masks=before, block=12)
    for mask, old, weight in zip(masks, before, updated, strict=True):
        assert kept_by_group(mask, 4).equal(kept_by_group(old, 4).clamp(max=2))
        assert not (mask & ~old).any()
        assert (weight == 0).equal(~mask)


@pytest.mark.parametrize("method", METHODS)
def test_14_natural_zeros_count(method: str) -> None:
    weights, gradients = random_problem((4, 8), seed=3)
    weights[0][:, [0, 3, 5, 6]] = 0
    masks, updated = prune64(weights, gradients, method=method, pattern="2:4", block=8)
    assert masks[0].equal(weights[0] != 0)
    assert updated[0].equal(weights[0])


def test_14_costs_no_less_than_unstructured() -> None:
    for seed in range(5):
        weights, gradients = random_problem((6, 8), seed=seed)
        options: Any = {"block": 48, "damp": 1e-2, "dtype": torch.float64}
        free = prune_streamed(weights, [gradients], 20, sparsity=0.5, **options)
        bound = prune_streamed(weights, [gradients], 20, pattern="2:4", **options)
        assert zeros(free.masks) == zeros(bound.masks)
        assert bound.errors[0] >= free.errors[0]


def test_14_a_group_as_large_as_the_block_is_every_block_alike() -> None:
    weights, gradients = random_problem((5, 8), seed=4)
    masks, updated = prune64(weights, gradients, pattern="3:8", block=8)
    for row in range(5):
        options: Any = {"sparsity": 5 / 8, "block": 8}
        (mask,), (weight,) = prune64([weights[0][row]], [gradients[0][:, row]], **options)
        assert masks[0][row].equal(mask)
        torch.testing.assert_close(updated[0][row], weight, rtol=1e-10, atol=1e-12)


def test_convolution_is_the_matrix_of_its_hardware_layout() -> None:
    weights, gradients = random_problem((4, 8, 3, 2), seed=5)
    masks, updated = prune64(weights, gradients, pattern="2:4", block=16)
    matrix, stack = (
        weights[0].permute(0, 2, 3, 1).reshape(4, -1),
        gradients[0].permute(0, 1, 3, 4, 2).reshape(20, 4, -1),
    )
    flat_masks, flat = prune64([matrix], [stack], pattern="2:4", block=16)
    assert masks[0].permute(0, 2, 3, 1).reshape(4, -1).equal(flat_masks[0])
    assert updated[0].permute(0, 2, 3, 1).reshape(4, -1).equal(flat[0])


@pytest.mark.parametrize("method", METHODS)
def test_errors_name_the_tensor(method: str) -> None:
    weights, gradients = random_problem((4, 6))
    with pytest.raises(ValueError, match=r"fc1: pattern 2:4.*multiple of 4.*\(4, 6\)"):
        prune_streamed(weights, [gradients], 20, names=["fc1"], method=method, pattern="2:4")
    with pytest.raises(ValueError, match="contradicts"):
        prune_streamed(weights, [gradients], 20, method=method, pattern="2:4", sparsity=0.75)
