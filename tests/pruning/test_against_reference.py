"""oViT equals the reference that inverts the Fisher matrix again at every step: masks exactly, weights to rounding."""

from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import prune64, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def assert_equals_reference(
    weights: list[Tensor], gradients: list[Tensor], masks: list[Tensor] | None = None, **options: Any
) -> None:
    got_masks, got_weights = prune64(weights, gradients, masks=masks, **options)
    want_masks, want_weights = reference.prune(
        [weight.numpy() for weight in weights],
        [gradient.numpy() for gradient in gradients],
        masks=None if masks is None else [mask.numpy() for mask in masks],
        **options,
    )
    for got_mask, got, want_mask, want in zip(got_masks, got_weights, want_masks, want_weights, strict=True):
        np.testing.assert_array_equal(got_mask.numpy(), want_mask)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rule", ["cumulative", "marginal"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [("unstructured", 0.6), ("2:4", None), ("1:4", 0.75), ({"block": [1, 4]}, 0.5), ({"block": [2, 2]}, 0.5)],
)
def test_matrices_and_convolutions(pattern: Any, sparsity: float | None, scope: str, rule: str) -> None:
    weights, gradients = random_problem((6, 8), (2, 4, 2, 1), (2, 4), seed=1)
    options = {"pattern": pattern, "sparsity": sparsity, "scope": scope, "rule": rule, "damp": 1e-3}
    assert_equals_reference(weights, gradients, block=12, **options)
    masks = [torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) > 0.3 for weight in weights]
    assert_equals_reference(weights, gradients, masks, block=8, **options)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    block=st.integers(1, 16),
    count=st.integers(1, 40),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.77, 1.0]),
    scope=st.sampled_from(["global", "layer"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_block_and_sparsity(
    sizes: list[int], block: int, count: int, sparsity: float, scope: str, seed: int
) -> None:
    weights, gradients = random_problem(*[(size,) for size in sizes], count=count, seed=seed)
    assert_equals_reference(weights, gradients, block=block, sparsity=sparsity, scope=scope, damp=1e-2)


def test_more_pivots_than_a_panel_and_blocks_that_lost_different_numbers() -> None:
    weights, gradients = random_problem((3, 70), count=30, seed=3)
    mask = torch.ones(3, 70, dtype=torch.bool)
    mask[0, :25] = mask[1, ::7] = False
    assert_equals_reference(weights, gradients, [mask], block=70, sparsity=0.8, damp=1e-2)
    assert_equals_reference(weights, gradients, [mask], block=70, sparsity=0.8, damp=1e-2, pattern={"block": [1, 5]})
