"""The projection against all subsets, penalties against autograd of the written Lagrangian, and convergence."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ovit_engine.structured.soft_pruning import (
    GroupLayout,
    distance,
    dual,
    first_target,
    group_norms,
    next_target,
    rescaled,
)


def keep_of(norms: Tensor, kept: int) -> Tensor:
    keep = torch.zeros(len(norms), dtype=torch.bool)
    keep[norms.argsort(descending=True)[:kept]] = True
    return keep


def members(part: GroupLayout, shape: Sequence[int], group: int) -> np.ndarray:
    """Where a group lies, entry by entry."""
    mask = np.zeros(shape, dtype=bool)
    for place in np.ndindex(*shape):
        mask[place] = place[part.axis] // part.width % part.count == group
    return mask


PARTS = st.builds(GroupLayout, st.just(0), st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 3]))


@given(PARTS, st.integers(1, 3), st.integers(1, 2), st.integers(0, 999))
def test_norms_and_spreading_by_loops(part: GroupLayout, other: int, ndim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = part.count * part.width * part.repeats
    shapes = [(length, other)[:ndim], (other, part.count * part.width)]
    parts = [part, GroupLayout(1, part.count, part.width)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    values = torch.randn(part.count, generator=generator)
    expected = np.zeros(part.count)
    for each, tensor in zip(parts, tensors, strict=True):
        spread = each.spread(values, tensor).expand(tensor.shape)
        for group in range(part.count):
            mask = members(each, tensor.shape, group)
            expected[group] += float((tensor.double().numpy()[mask] ** 2).sum())
            assert (spread.numpy()[mask] == float(values[group])).all()
    assert np.allclose(group_norms(parts, tensors).double().numpy() ** 2, expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_keeping_the_largest_is_the_nearest_point(seed: int) -> None:
    """G7: of all ways to keep 3 of 6 groups, the Euclidean projection."""
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for shape in ((6, 4), (6,), (5, 6))]
    parts = [GroupLayout(0, 6), GroupLayout(0, 6), GroupLayout(1, 6)]
    best, nearest = math.inf, ()
    for subset in itertools.combinations(range(6), 3):
        gone = [group for group in range(6) if group not in subset]
        moved = sum(
            float((tensor.double().numpy()[members(part, tensor.shape, group)] ** 2).sum())
            for part, tensor in zip(parts, tensors, strict=True)
            for group in gone
        )
        if moved < best:
            best, nearest = moved, subset
    keep = keep_of(group_norms(parts, tensors), 3)
    assert tuple(keep.nonzero().flatten().tolist()) == nearest
    far = sum(
        float(distance(tensor, first_target(tensor, part.spread(keep, tensor)), part.spread(keep, tensor)))
        for part, tensor in zip(parts, tensors, strict=True)
    )
    assert far == pytest.approx(best, rel=1e-5)


@given(st.integers(0, 999), st.lists(st.floats(1, 3), min_size=1, max_size=6))
def test_one_tensor_holds_z_and_u_as_written(seed: int, factors: list[float]) -> None:
    """Z <- project(W + U), U <- U + W - Z; then rho grows and U falls: step by step with Z and U apart, in float64."""
    generator = torch.Generator().manual_seed(seed)
    part, weight = GroupLayout(0, 4), torch.randn(4, 3, generator=generator)
    keep = keep_of(group_norms([part], [weight]), 2)
    target = first_target(weight, part.spread(keep, weight))
    z, u = np.where(keep[:, None], weight.double().numpy(), 0), np.zeros((4, 3))
    for factor in factors:
        assert np.allclose(target.double().numpy(), z - u, atol=1e-5)
        assert np.allclose(dual(target, keep[:, None]).double().numpy(), u, atol=1e-5)
        weight = weight + 0.5 * torch.randn(4, 3, generator=generator)
        w = weight.double().numpy()
        shifted = weight + dual(target, keep[:, None])
        keep = keep_of(group_norms([part], [shifted]), 2)
        target = next_target(shifted, keep[:, None])
        order = np.argsort(-np.linalg.norm(w + u, axis=1))[:2]
        z = np.where(np.isin(np.arange(4), order)[:, None], w + u, 0)
        u = u + w - z
        assert np.allclose(float(distance(weight, target, keep[:, None])), ((w - z) ** 2).sum(), rtol=1e-4)
        target = rescaled(target, keep[:, None], factor)
        u = u / factor


def test_the_pull_is_the_gradient_of_the_augmented_term() -> None:
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    z, u, rho = torch.randn(5, 3), torch.randn(5, 3), 0.37
    (rho / 2 * (weight - z + u).square().sum()).backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, rho * (weight.detach() - (z - u)))


def minimised(optimizer_type: Callable[..., Any], ramp: float, **options: Any) -> tuple[list[float], list[list[int]]]:
    """Residuals and kept groups of soft pruning to 3 of 8 groups on a convex quadratic."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(32, 32, generator=generator)
    hessian, best = raw @ raw.T / 32 + 0.1 * torch.eye(32), torch.randn(32, generator=generator)
    weight = best.clone().view(8, 4).requires_grad_(True)
    optimizer = optimizer_type([weight], **options)
    part, rho = GroupLayout(0, 8), 1e-2
    keep = keep_of(group_norms([part], [weight]), 3)
    target = first_target(weight, keep[:, None])
    residuals, supports = [], []
    for _ in range(50):
        for _ in range(25):
            optimizer.zero_grad()
            step = weight.flatten() - best
            (step @ hessian @ step / 2).backward()
            with torch.no_grad():
                assert weight.grad is not None
                weight.grad += rho * (weight - target)
            optimizer.step()
        shifted = weight.detach() + dual(target, keep[:, None])
        keep = keep_of(group_norms([part], [shifted]), 3)
        target = next_target(shifted, keep[:, None])
        residuals.append(math.sqrt(float(distance(weight, target, keep[:, None]))) / float(weight.detach().norm()))
        supports.append(keep.nonzero().flatten().tolist())
        if residuals[-1] > 0.005 and rho < 1e3:
            target, rho = rescaled(target, keep[:, None], ramp), rho * ramp
    return residuals, supports


@pytest.mark.parametrize(("kind", "rate"), [(torch.optim.SGD, 1e-2), (torch.optim.Adam, 1e-2)])
def test_with_growing_penalties_it_comes_to_rest_on_one_set_of_groups(kind: Any, rate: float) -> None:
    """G9."""
    residuals, supports = minimised(kind, 1.3, lr=rate)
    assert residuals[-1] < 1e-2
    assert residuals[0] > 0.3
    assert all(support == supports[-1] for support in supports[-10:])


def test_without_growth_adam_does_not_come_to_rest() -> None:
    residuals, _ = minimised(torch.optim.Adam, 1.0, lr=5e-3)
    assert residuals[-1] > 0.3
