"""Counts, swaps and budgets of heads and units, against plain Python that sorts lists."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ovit_engine.structured.selection import keep_best, keep_within, kept_count, swap, swap_count

SCORES = st.integers(-3, 3).map(float)  # few values, so that ties are common
LAYER = st.lists(st.tuples(st.booleans(), SCORES, SCORES), min_size=1, max_size=9).filter(
    lambda layer: any(on for on, *_ in layer)
)


def columns(layer: list[tuple[bool, float, float]]) -> tuple[Tensor, Tensor, Tensor]:
    on, first, second = zip(*layer, strict=True)
    return torch.tensor(on), torch.tensor(first), torch.tensor(second)


@pytest.mark.parametrize(
    ("count", "sparsity", "kept"),
    [  # H10 of the spec; the widths of DeiT; shares that floats get wrong
        *[(3, 0.3, 2), (6, 0.3, 4), (12, 0.3, 8), (768, 0.3, 537), (1536, 0.4, 921), (3072, 0.4, 1843)],
        *[(5, 0.8, 1), (10, 0.8, 2), (100, 0.9, 10), (10, 0.9, 1), (10, 0.3, 7), (4, 0.99, 1), (5, 0.5, 2)],
    ],
)
def test_kept_counts_as_released(count: int, sparsity: float, kept: int) -> None:
    assert kept_count(count, sparsity) == kept


def test_nothing_goes_at_zero() -> None:
    assert [kept_count(count, 0.0) for count in range(1, 50)] == list(range(1, 50))


@pytest.mark.parametrize(
    ("active", "share", "least", "count"),
    [(2, 0.005, 1, 1), (2, 0.005, 0, 0), (4, 0.3, 1, 2), (4, 0.3, 0, 1), (4, 0.5, 3, 3), (2, 0.5, 5, 2), (8, 0, 1, 1)],
)
def test_swap_counts(active: int, share: float, least: int, count: int) -> None:
    assert swap_count(active, share, least) == count


@given(LAYER, st.data())
def test_a_swap_is_what_sorting_says(layer: list[tuple[bool, float, float]], data: st.DataObject) -> None:
    keep, drop, grow = columns(layer)
    on = [i for i in range(len(layer)) if keep[i]]
    count = data.draw(st.integers(0, len(on)))
    gone = sorted(on, key=lambda i: (drop[i], i))[:count]
    off = [i for i in range(len(layer)) if i not in on or i in gone]
    came = sorted(off, key=lambda i: (-grow[i], i))[:count]
    expected = (set(on) - set(gone)) | set(came)
    assert set(swap(keep, drop, grow, count).nonzero().flatten().tolist()) == expected
    assert len(expected) == len(on)


@given(st.lists(LAYER, min_size=1, max_size=4), st.integers(0, 40))
def test_the_best_of_all_layers_are_kept(layers: list[list[tuple[bool, float, float]]], kept: int) -> None:
    keeps, scores, _ = map(list, zip(*map(columns, layers), strict=True))
    on = [(layer, i) for layer, keep in enumerate(keeps) for i in range(len(keep)) if keep[i]]
    safe = {
        (layer, max((float(scores[layer][i]), i) for i in range(len(keep)) if keep[i])[1])
        for layer, keep in enumerate(keeps)
    }
    order = sorted((place for place in on if place not in safe), key=lambda place: (scores[place[0]][place[1]], place))
    lost = max(0, len(on) - max(kept, len(layers)))
    expected = set(on) - set(order[:lost])
    after = keep_best(keeps, scores, kept)
    assert {(layer, i) for layer, keep in enumerate(after) for i in range(len(keep)) if keep[i]} == expected


@given(
    st.lists(LAYER, min_size=1, max_size=4), st.lists(st.integers(1, 20), min_size=4, max_size=4), st.integers(0, 300)
)
def test_a_parameter_budget_is_filled(
    layers: list[list[tuple[bool, float, float]]], sizes: list[int], budget: int
) -> None:
    keeps, scores, _ = map(list, zip(*map(columns, layers), strict=True))
    sizes = sizes[: len(keeps)]
    before = sum(int((~keep).sum()) * size for keep, size in zip(keeps, sizes, strict=True))
    after = keep_within(keeps, scores, sizes, budget)
    removed = sum(int((~keep).sum()) * size for keep, size in zip(after, sizes, strict=True))
    assert removed <= max(budget, before)
    for layer, (old, new) in enumerate(zip(keeps, after, strict=True)):
        assert new.any()
        assert not (new & ~old).any()
        if int(new.sum()) > 1:  # what stays did not fit
            assert removed + sizes[layer] > budget
        went = [i for i in range(len(old)) if old[i] and not new[i]]
        if went and int(new.sum()):
            assert max((float(scores[layer][i]), i) for i in went) <= max(
                (float(scores[layer][i]), i) for i in range(len(old)) if new[i]
            )


@given(st.lists(LAYER, min_size=1, max_size=4), st.integers(0, 40))
def test_a_budget_of_alike_is_a_count(layers: list[list[tuple[bool, float, float]]], kept: int) -> None:
    keeps, scores, _ = map(list, zip(*map(columns, layers), strict=True))
    total = sum(keep.numel() for keep in keeps)
    found = keep_within(keeps, scores, [1] * len(keeps), total - kept)
    for one, other in zip(found, keep_best(keeps, scores, kept), strict=True):
        assert torch.equal(one, other)


def test_scores_that_are_no_numbers() -> None:
    keep, bad = torch.ones(2, dtype=torch.bool), torch.tensor([1.0, math.nan])
    with pytest.raises(FloatingPointError, match="a score is NaN, so heads and units can't be compared"):
        keep_best([keep], [bad], 1)
    assert keep_best([keep], [torch.tensor([math.inf, 1.0])], 1)[0].tolist() == [True, False]
