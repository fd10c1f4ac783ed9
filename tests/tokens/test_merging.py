"""Merging of tokens against loops over pairs, in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ovit_engine.tokens.counts import falling_amounts, merged_counts
from ovit_engine.tokens.merging import follow_places, match_tokens, merge_tokens


def cosine(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def pairs(metric: list[list[float]], prefix: int, amount: int) -> list[tuple[int, int]]:
    """(even place, odd place) of those that merge, among all tokens, the most alike first."""
    even = [place for place in range(0, len(metric), 2) if place >= prefix]
    odd = [place for place in range(1, len(metric), 2) if place >= prefix]
    best = [(max((cosine(metric[a], metric[b]), b) for b in odd), a) for a in even]
    best.sort(key=lambda each: -each[0][0])
    return [(a, b) for (_, b), a in best[:amount]]


def merged(
    metric: list[list[float]], x: list[list[float]], sizes: list[float], prefix: int, amount: int
) -> tuple[list[list[float]], list[float], list[int]]:
    """Tokens and sizes after the pairs are merged one after the other, and places they came from."""
    x, sizes = [list(token) for token in x], list(sizes)
    gone = set()
    for a, b in pairs(metric, prefix, amount):
        total = sizes[a] + sizes[b]
        x[b] = [(p * sizes[a] + q * sizes[b]) / total for p, q in zip(x[a], x[b], strict=True)]
        sizes[b] = total
        gone.add(a)
    order = [*range(prefix)]
    order += [place for place in range(0, len(x), 2) if place >= prefix and place not in gone]
    order += [place for place in range(1, len(x), 2) if place >= prefix]
    return [x[place] for place in order], [sizes[place] for place in order], order


def drawn(images: int, prefix: int, patches: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(images + 11 * prefix + 31 * patches)
    metric = torch.randn(images, prefix + patches, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(images, prefix + patches, 3, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 5, (images, prefix + patches), generator=generator).double()
    return metric, x, sizes


@given(st.integers(1, 3), st.integers(1, 5), st.integers(2, 13), st.data())
def test_merging_is_that_of_the_pairs(images: int, prefix: int, patches: int, data: st.DataObject) -> None:
    amount = data.draw(st.integers(1, patches // 2))
    metric, x, sizes = drawn(images, prefix, patches)
    matching = match_tokens(metric, prefix, amount)
    tokens, counted = merge_tokens(x, sizes, matching, prefix)
    places = follow_places(torch.arange(patches).expand(images, -1), matching, prefix)
    for image in range(images):
        expected, their_sizes, order = merged(
            metric[image].tolist(), x[image].tolist(), sizes[image].tolist(), prefix, amount
        )
        assert torch.allclose(tokens[image], torch.tensor(expected, dtype=torch.float64), atol=1e-12)
        assert counted[image].tolist() == their_sizes
        assert places[image].tolist() == [place - prefix for place in order[prefix:]]
    # nothing is lost: patches are all counted, and the weighted sum stays
    assert torch.equal(counted.sum(1), sizes.sum(1))
    before, after = (x * sizes.unsqueeze(-1)).sum(1), (tokens * counted.unsqueeze(-1)).sum(1)
    assert torch.allclose(before, after, atol=1e-10)


def test_nine_tokens_by_every_way_to_match_them() -> None:
    """Of all ways to send two tokens of A to tokens of B, the one whose likeness sums to most is taken."""
    metric, _, _ = drawn(1, 1, 8)
    (rows,) = metric.tolist()
    ways = {}
    for a in (2, 4, 6, 8):
        for other in (2, 4, 6, 8):
            for b in (1, 3, 5, 7):
                for partner in (1, 3, 5, 7):
                    if a < other:
                        ways[(a, b), (other, partner)] = cosine(rows[a], rows[b]) + cosine(rows[other], rows[partner])
    matching = match_tokens(metric, 1, 2)
    # behind the class token A are the patches in odd places of the nine minus one: 2, 4, 6, 8
    found = {
        (2 * source + 2, 2 * target + 1)
        for source, target in zip(matching.sources[0].tolist(), matching.targets[0].tolist(), strict=True)
    }
    assert found == set(max(ways, key=lambda way: ways[way]))


@given(st.integers(1, 2), st.integers(2, 12))
def test_a_product_with_ones_is_what_scatter_does(prefix: int, patches: int) -> None:
    metric, x, sizes = drawn(3, prefix, patches)
    x, sizes = x.float(), sizes.float()
    matching = match_tokens(metric, prefix, patches // 2)
    tokens, counted = merge_tokens(x, sizes, matching, prefix)
    patch, size = x[:, prefix:], sizes[:, prefix:]
    sources = [place for place in range(patches) if (place + prefix) % 2 == 0]
    targets = [place for place in range(patches) if (place + prefix) % 2 == 1]
    weighted = (patch * size.unsqueeze(-1))[:, targets]
    moved = (patch * size.unsqueeze(-1))[:, sources].gather(1, matching.sources.unsqueeze(-1).expand(-1, -1, 3))
    weighted = weighted.scatter_reduce(1, matching.targets.unsqueeze(-1).expand(-1, -1, 3), moved, "sum")
    total = size[:, targets].scatter_reduce(1, matching.targets, size[:, sources].gather(1, matching.sources), "sum")
    assert torch.equal(counted[:, -len(targets) :], total)
    assert torch.allclose(tokens[:, -len(targets) :], weighted / total.unsqueeze(-1), atol=1e-6)


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_prefix_tokens_are_never_merged(prefix: int) -> None:
    """Also where they are all alike, and nothing else is."""
    metric, x, _ = drawn(2, prefix, 10)
    metric[:, :prefix] = metric[:, prefix : prefix + 1]
    tokens, sizes = merge_tokens(x, torch.ones(2, prefix + 10), match_tokens(metric, prefix, 5), prefix)
    assert torch.equal(tokens[:, :prefix], x[:, :prefix])
    assert (sizes[:, :prefix] == 1).all()
    assert tokens.shape[1] == prefix + 5


def test_halves_are_averaged_in_float() -> None:
    """Large sizes would overflow in half precision, and small ones be lost."""
    x = torch.tensor([[[0.0], [1000.0], [1000.0]]], dtype=torch.float16)
    matching = match_tokens(torch.ones(1, 3, 2), 1, 1)
    tokens, sizes = merge_tokens(x, torch.tensor([[1.0, 150.0, 3.0]]), matching, 1)
    assert tokens.dtype == torch.float16
    assert tokens.flatten().tolist() == [0.0, 1000.0]
    assert sizes.tolist() == [[1.0, 153.0]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, _ = merge_tokens(torch.tensor([[[0.0], [1.0], [1.001]]]), torch.ones(1, 3), matching, 1)
    assert float(tokens[0, 1]) == pytest.approx(1.0005, abs=1e-6)


def test_gradients_flow_through_averages() -> None:
    x = torch.randn(1, 3, 1, requires_grad=True)
    matching = match_tokens(torch.ones(1, 3, 2), 1, 1)
    tokens, _ = merge_tokens(x, torch.tensor([[1.0, 1.0, 3.0]]), matching, 1)
    (gradient,) = torch.autograd.grad(tokens[0, 1].sum(), x)
    assert gradient.flatten().tolist() == [0.0, 0.25, 0.75]


def test_counts_fall_until_one_is_left() -> None:
    assert merged_counts(196, [13] * 12) == [183, 170, 157, 144, 131, 118, 105, 92, 79, 66, 53, 40]
    assert merged_counts(16, [6] * 5) == [10, 5, 3, 2, 1]
    assert merged_counts(16, [0, 3, 0]) == [16, 13, 13]


@given(st.integers(1, 50), st.integers(1, 30))
def test_falling_amounts_begin_at_twice_and_end_at_none(amount: int, depth: int) -> None:
    found = falling_amounts(amount, depth)
    assert len(found) == depth
    if depth == 1:
        assert found == [amount]
        return
    assert (found[0], found[-1]) == (2 * amount, 0)
    assert found == sorted(found, reverse=True)
    assert found == [math.floor(2 * amount - place * 2 * amount / (depth - 1) + 1e-9) for place in range(depth)]
    assert amount * depth - depth < sum(found) <= amount * depth
