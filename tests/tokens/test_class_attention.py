"""Attention of the class token and what is kept by it, against loops in float64."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ovit_engine.tokens.attended import class_attention, keep_attended, shares_at
from ovit_engine.tokens.counts import ceil_counts, shares_of


@pytest.mark.parametrize(
    ("keep", "fuse", "counts"),
    [
        (0.7, False, [138, 97, 68]),
        (0.7, True, [138, 98, 70]),
        (0.5, False, [98, 49, 25]),
        (0.5, True, [98, 50, 26]),
        (1.0, True, [196, 196, 196]),
    ],
)
def test_counts_are_rounded_up_stage_by_stage(keep: float, fuse: bool, counts: list[int]) -> None:
    assert ceil_counts(196, [keep] * 3, fuse=fuse) == counts


@given(st.integers(1, 1000), st.integers(1, 100), st.booleans(), st.integers(1, 5))
def test_counts_are_those_of_exact_fractions(patches: int, percent: int, fuse: bool, stages: int) -> None:
    expected, left = [], patches
    for _ in range(stages):
        keep = math.ceil(Fraction(percent, 100) * left)
        expected.append(keep)
        left = keep + 1 if fuse and keep < left else keep
    found = ceil_counts(patches, [percent / 100] * stages, fuse=fuse)
    assert found == expected
    assert min(found) >= 1
    assert ceil_counts(patches, shares_of(patches, found, fuse=fuse), fuse=fuse) == found


def test_the_share_falls_down_half_a_cosine() -> None:
    found = [shares_at(step, [0.7, 0.4], 10, 30) for step in (0, 9, 10, 15, 20, 29, 30, 99)]
    quarter = (1 + math.cos(math.pi / 4)) / 2
    last = (1 + math.cos(math.pi * 19 / 20)) / 2
    falls = [1, 1, 1, quarter, 0.5, last, 0, 0]
    assert found == [pytest.approx([0.7 + 0.3 * fall, 0.4 + 0.6 * fall]) for fall in falls]
    assert shares_at(0, [0.7], 0, 0) == [0.7]
    assert shares_at(3, [0.7], 4, 4) == [1.0]
    assert shares_at(4, [0.7], 4, 4) == [0.7]


def row_by_row(queries: Tensor, keys: Tensor, prefix: int) -> Tensor:
    images, heads, readers, width = queries.shape
    found = torch.zeros(images, keys.shape[2], dtype=torch.float64)
    for image in range(images):
        for head in range(heads):
            for reader in range(readers):
                query = queries[image, head, reader].tolist()
                scores = [
                    sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(width)
                    for key in keys[image, head].tolist()
                ]
                total = sum(math.exp(score) for score in scores)
                for place, score in enumerate(scores):
                    found[image, place] += math.exp(score) / total / heads / readers
    return found[:, prefix:]


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 6))
def test_the_row_is_that_of_the_map(images: int, heads: int, readers: int, extra: int, patches: int) -> None:
    generator = torch.Generator().manual_seed(images + 7 * heads + patches)
    prefix = readers + extra
    queries = torch.randn(images, heads, readers, 4, generator=generator, dtype=torch.float64)
    keys = torch.randn(images, heads, prefix + patches, 4, generator=generator, dtype=torch.float64)
    expected = row_by_row(queries, keys, prefix)
    found = class_attention(queries, keys, prefix)
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(class_attention(queries.float(), keys.float(), prefix).double(), expected, atol=1e-6)


def test_rounded_queries_give_scores_that_are_not_rounded() -> None:
    queries, keys = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 200, 8)
    exact = class_attention(queries, keys, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(class_attention(queries, keys, 1), exact)
    halves = class_attention(queries.bfloat16(), keys.bfloat16(), 1)
    assert halves.dtype == torch.float32
    assert torch.equal(halves, class_attention(queries.bfloat16().float(), keys.bfloat16().float(), 1))


@given(st.integers(1, 3), st.integers(0, 2), st.integers(1, 8), st.booleans(), st.data())
def test_the_most_attended_stay_and_the_others_are_summed(
    images: int, prefix: int, patches: int, fuse: bool, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, patches - 1)) if patches > 1 else 1
    fuse = fuse and keep < patches
    generator = torch.Generator().manual_seed(images + 5 * patches + keep)
    x = torch.randn(images, prefix + patches, 3, generator=generator, dtype=torch.float64)
    attention = torch.rand(images, patches, generator=generator, dtype=torch.float64)
    found, index = keep_attended(x, attention, keep, prefix, fuse=fuse)
    assert found.shape == (images, prefix + keep + fuse, 3)
    for image in range(images):
        order = sorted(range(patches), key=lambda place: -float(attention[image, place]))
        expected = [x[image, place] for place in range(prefix)]
        expected += [x[image, prefix + place] for place in order[:keep]]
        if fuse:
            parts = [float(attention[image, place]) * x[image, prefix + place] for place in order[keep:]]
            expected.append(torch.stack(parts).sum(0))
        assert index[image].tolist() == order[:keep]
        assert torch.allclose(found[image], torch.stack(expected), atol=1e-12)


def test_the_fused_token_is_not_renormalised_and_lets_attention_learn() -> None:
    x = torch.tensor([[[9.0], [1.0], [2.0], [4.0]]])
    attention = torch.tensor([[0.1, 0.5, 0.2]], requires_grad=True)
    found, _ = keep_attended(x, attention, 1, 1, fuse=True)
    assert found.flatten().tolist() == pytest.approx([9.0, 2.0, 0.1 * 1 + 0.2 * 4])
    (gradient,) = torch.autograd.grad(found.sum(), attention)
    assert gradient.tolist() == [[1.0, 0.0, 4.0]]
