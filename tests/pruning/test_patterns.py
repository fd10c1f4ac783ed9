"""Patterns: what they keep, what they refuse, how they are spelled."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ovit_engine.pruning.patterns import NM, Block, Pattern, Unstructured, from_hardware, parse_pattern, to_hardware

inf = float("inf")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", Unstructured()),
        ("2:4", NM(2, 4)),
        ("1:4", NM(keep=1, group=4)),
        ({"block": [1, 4]}, Block(1, 4)),
        (NM(2, 4), NM(2, 4)),
    ],
)
def test_spelling_goes_round(text: object, pattern: Pattern) -> None:
    assert parse_pattern(text) == pattern
    assert parse_pattern(pattern.describe()) == pattern
    assert parse_pattern(str(pattern)) == pattern
    assert isinstance(pattern, Pattern)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("4:2", "4:2.*keep:group.*2:4 keeps 2 of every 4"),
        ("4:4", "keep < group"),
        ("0:4", "1 <= keep"),
        (124, "unquoted 2:4 is read by YAML as the number 124: write it in quotes"),
        (64, "unquoted 1:4 is read by YAML as the number 64"),
        (4, "pattern 4 is a number"),
        (True, "pattern True"),
        (0.5, "pattern 0.5"),
        (None, "pattern None"),
        ("unstructed", "did you mean 'unstructured'"),
        ("block", r"did you mean '\{block: \[1, 4\]\}'"),
        ("banana", "unknown pattern 'banana'; there are unstructured, 2:4, "),
        ({"block": 4}, "rows, columns"),
        ({"blocks": [1, 4]}, "rows, columns"),
        ({"block": [1, 2.5]}, "whole numbers"),
        ({"block": [0, 4]}, "1 or more"),
    ],
)
def test_misspellings_are_explained(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_pattern(value)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(2, 4)])
def test_values_can_be_hashed_copied_and_pickled(pattern: Pattern) -> None:
    assert hash(pattern) == hash(copy.deepcopy(pattern))
    assert pickle.loads(pickle.dumps(pattern)) == pattern


def test_unstructured_drops_the_lowest_ties_by_position() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0], [1.0, 5.0, 0.0]])
    expected = torch.tensor([[True, False, False], [True, True, False]])
    assert Unstructured().mask(scores, 0.5).equal(expected)


def test_nm_keeps_the_best_of_each_group_ties_by_position() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0, 7.0, 7.0, 7.0, 7.0]])
    expected = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    assert NM(2, 4).mask(scores).equal(expected)
    assert NM(2, 4).mask(scores, 0.5).equal(expected)


def test_nm_group_with_more_zeros_than_needed_keeps_fewer() -> None:
    scores = torch.tensor([[-inf, -inf, -inf, 1.0, -inf, 2.0, 3.0, 1.0]])
    expected = torch.tensor([[0, 0, 0, 1, 0, 1, 1, 0]], dtype=torch.bool)
    assert NM(2, 4).mask(scores).equal(expected)


def test_nm_of_a_convolution_groups_input_channels() -> None:
    scores = torch.zeros(1, 4, 1, 2)
    scores[0, :, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scores[0, :, 0, 1] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    kept = NM(2, 4).mask(scores)
    assert kept[0, :, 0, 0].tolist() == [False, False, True, True]
    assert kept[0, :, 0, 1].tolist() == [True, True, False, False]


def test_block_drops_whole_tiles() -> None:
    scores = torch.tensor([[1.0, 1.0, 9.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert Block(2, 2).mask(scores, 0.5).tolist() == [[False, False, True, True]] * 2
    assert Block(1, 2).mask(scores, 0.25).tolist() == [[True] * 4, [True, True, False, False]]


def test_block_leaves_what_was_pruned_before() -> None:
    scores = torch.tensor([[-inf, 5.0, 1.0, 1.0, -inf, -inf]])
    assert Block(1, 2).mask(scores, 1 / 3).tolist() == [[False, True, True, True, False, False]]
    assert Block(1, 2).mask(scores, 2 / 3).tolist() == [[False, True, False, False, False, False]]


@pytest.mark.parametrize(
    ("pattern", "shape", "words"),
    [
        (NM(2, 4), (8, 6), r"2:4.*multiple of 4.*\(8, 6\)"),
        (NM(2, 4), (8, 1, 3, 3), r"\(8, 1, 3, 3\)"),
        (Block(1, 4), (8, 6), r"block: \[1, 4\].*\(8, 6\)"),
        (Block(4, 1), (6, 8), r"\(6, 8\) has 6 and 8"),
        (Block(2, 2), (8,), r"\(8,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(pattern: Pattern, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pattern.mask(torch.ones(shape), 0.5)


def test_sparsity_out_of_range_missing_or_contradicting() -> None:
    scores = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"between 0 and 1, is 1\.2"):
        Unstructured().mask(scores, 1.2)
    with pytest.raises(ValueError, match="between 0 and 1, is nan"):
        Block(1, 4).mask(scores, float("nan"))
    with pytest.raises(ValueError, match="unstructured needs a sparsity"):
        Unstructured().mask(scores)
    with pytest.raises(ValueError, match=r"2:4 is a sparsity of 0\.5: sparsity 0\.75 contradicts it"):
        NM(2, 4).mask(scores, 0.75)
    assert NM(1, 3).resolve(0.667) == pytest.approx(2 / 3)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(1, 4)])
def test_nan_scores_are_refused(pattern: Pattern) -> None:
    with pytest.raises(ValueError, match="NaN"):
        pattern.mask(torch.full((4, 4), float("nan")), 0.5)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(2, 4)])
@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 3), (2, 4, 3, 2)])
def test_layouts_go_round_with_and_without_a_stack(pattern: Pattern, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(2 * torch.Size(shape).numel()).reshape(2, *shape)
    flat = pattern.to_layout(tensor, leading=1)
    for each, one in zip(flat, tensor, strict=True):
        assert pattern.to_layout(one).equal(each)
        assert pattern.from_layout(each, one.shape).equal(one)


def test_hardware_layout_puts_input_channels_last() -> None:
    weight = torch.arange(12).reshape(1, 3, 2, 2)
    assert to_hardware(weight).tolist() == [[0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]]
    assert from_hardware(to_hardware(weight), weight.shape).equal(weight)
    assert to_hardware(torch.arange(3)).shape == (1, 3)
    assert to_hardware(torch.tensor(1)).shape == (1, 1)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.floats(0, 1))
def test_counts_are_exact_whatever_the_ties(values: list[int], sparsity: float) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    kept = Unstructured().mask(scores, sparsity)
    assert int((~kept).sum()) == round(sparsity * len(values))
    if (~kept).any() and kept.any():
        assert scores[~kept].max() <= scores[kept].min()
