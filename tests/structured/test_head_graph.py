"""The walk over heads: its distribution against iteration and against an eigenvector, similarities against loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ovit_engine.structured.similarity import KERNELS, Kernel, similarities, stationary_distribution

KERNEL_NAMES: list[Kernel] = ["shift", "clip", "exp"]


def outputs(samples: int, heads: int, features: int, seed: int) -> Tensor:
    return torch.randn(samples, heads, features, generator=torch.Generator().manual_seed(seed))


def by_loops(values: Tensor, kernel: str, temperature: float) -> np.ndarray:
    """Sum of similarities in float64, pair by pair."""
    heads = values.shape[1]
    total = np.zeros((heads, heads))
    for sample in values.double().numpy():
        for g in range(heads):
            for h in range(heads):
                size = np.linalg.norm(sample[g]) * np.linalg.norm(sample[h])
                c = float(sample[g] @ sample[h] / size) if size else 0.0
                phi = {"shift": (1 + c) / 2, "clip": max(c, 0.0), "exp": math.exp((c - 1) / temperature)}[kernel]
                total[g, h] += 1.0 if g == h else phi
    return total


def by_iteration(similarity: np.ndarray) -> np.ndarray:
    """The walk itself, from one corner, until it stands still."""
    transition = similarity / similarity.sum(1, keepdims=True)
    place = np.zeros(len(similarity))
    place[0] = 1.0
    for _ in range(100_000):
        place, before = place @ transition, place
        if np.abs(place - before).max() < 1e-15:
            break
    return place


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_the_distribution_is_where_the_walk_settles(heads: int, seed: int) -> None:
    """G1, on symmetric positive matrices, and the left eigenvector of eigenvalue 1."""
    raw = np.random.default_rng(seed).uniform(0.05, 1, (heads, heads))
    similarity = (raw + raw.T) / 2
    found = stationary_distribution(torch.from_numpy(similarity)).numpy()
    assert np.allclose(found, by_iteration(similarity), rtol=0, atol=1e-8)
    transition = similarity / similarity.sum(1, keepdims=True)
    values, vectors = np.linalg.eig(transition.T)
    eigenvector = np.real(vectors[:, np.argmax(np.real(values))])
    assert np.allclose(found, eigenvector / eigenvector.sum(), atol=1e-8)
    assert np.isclose(found.sum(), 1)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), st.sampled_from(KERNEL_NAMES), st.integers(0, 99))
def test_similarities_by_loops(samples: int, heads: int, features: int, kernel: Kernel, seed: int) -> None:
    values = outputs(samples, heads, features, seed)
    values[0, 0] = 0  # a head that is silent
    temperature = 0.5 + seed / 50
    found = similarities(values, kernel, temperature)
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), by_loops(values, kernel, temperature), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_every_row_makes_a_probability(kernel: Kernel) -> None:
    """G2: opposite heads, of which raw cosines sum to nothing; the chain on them has rows of sum 1, entries >= 0."""
    assert set(KERNELS) == set(KERNEL_NAMES)
    one = torch.randn(5, 1, 8, generator=torch.Generator().manual_seed(0))
    for opposite in (torch.cat((one, -one), 1), torch.cat((one, -one, one, -one), 1)):
        similarity = similarities(opposite, kernel)
        assert (similarity >= 0).all()
        transition = similarity / similarity.sum(1, keepdim=True)
        assert torch.allclose(transition.sum(1), torch.ones(len(transition)))
        assert stationary_distribution(similarity).tolist() == pytest.approx([1 / len(similarity)] * len(similarity))


def test_heads_that_are_the_same_rank_the_same() -> None:
    """G3."""
    values = outputs(16, 5, 12, 1)
    values[:, 3] = values[:, 1]
    distribution = stationary_distribution(similarities(values))
    assert distribution[1] == pytest.approx(float(distribution[3]), rel=1e-6)
    assert distribution.sort().values.diff().max() > 1e-4


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_the_walk_on_two_heads_settles(kernel: Kernel) -> None:
    """G4: without self-loops it would go to and fro for ever."""
    similarity = similarities(outputs(4, 2, 6, 2), kernel).double().numpy()
    assert (similarity.diagonal() == 4).all()
    assert by_iteration(similarity) == pytest.approx([0.5, 0.5], abs=1e-8)
    found = stationary_distribution(torch.from_numpy(similarity)).tolist()
    assert found == pytest.approx([0.5, 0.5])  # as is any symmetric pair


@given(st.permutations(range(6)), st.sampled_from(KERNEL_NAMES))
def test_the_order_of_heads_and_images_does_not_matter(order: list[int], kernel: Kernel) -> None:
    """G5, and G6."""
    values = outputs(6, 6, 10, 3)
    plain = stationary_distribution(similarities(values, kernel))
    assert torch.allclose(stationary_distribution(similarities(values[:, order], kernel)), plain[order], rtol=1e-5)
    assert torch.allclose(stationary_distribution(similarities(values[order], kernel)), plain, rtol=1e-5)
    parts = similarities(values[:2], kernel) + similarities(values[2:], kernel)
    assert torch.allclose(stationary_distribution(parts), plain, rtol=1e-5)


def test_a_head_that_is_like_the_others_ranks_first_and_scale_does_not_matter() -> None:
    shared = torch.randn(32, 1, 20, generator=torch.Generator().manual_seed(4))
    noise = outputs(32, 4, 20, 5)
    values = shared * torch.tensor([1.0, 0.6, 0.3, 0.0]).view(1, 4, 1) + 0.5 * noise
    scales = torch.tensor([0.01, 5.0, 1.0, 300.0]).view(1, 4, 1)
    ranked = stationary_distribution(similarities(values * scales))
    assert ranked.argsort(descending=True).tolist() == [0, 1, 2, 3]
    assert torch.allclose(ranked, stationary_distribution(similarities(values)), rtol=1e-5)
    assert torch.equal(stationary_distribution(4 * similarities(values)), stationary_distribution(similarities(values)))


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ([[1.0, -0.1], [-0.1, 1.0]], "non-negative"),
        ([[0.0, 1.0], [1.0, 0.0]], "of a head to itself positive"),
        ([[1.0, 0.2], [0.7, 1.0]], "symmetric"),
        ([[1.0, 0.2, 0.1], [0.2, 1.0, 0.1]], r"symmetric matrix, not \[2, 3\]"),
        ([[1.0, math.nan], [math.nan, 1.0]], "not finite: did training diverge"),
    ],
)
def test_what_is_no_matrix_of_similarities(matrix: list[list[float]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stationary_distribution(torch.tensor(matrix))
