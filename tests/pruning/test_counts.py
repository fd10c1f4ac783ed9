"""How many weights go: exactly as many as asked, whatever the shape, the ties and the past."""

from typing import Any

import pytest
import torch
from cases import prune64, random_problem, zeros
from hypothesis import given, settings
from hypothesis import strategies as st

from ovit_engine.pruning import METHODS
from ovit_engine.pruning.blocks import partition
from ovit_engine.pruning.patterns import parse_pattern


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("total", [0, 1, 2, 33, 65, 66])
def test_any_count(total: int, method: str) -> None:
    weights, gradients = random_problem((5, 9), (7, 3))
    masks, updated = prune64(weights, gradients, method=method, sparsity=total / 66, block=8)
    assert zeros(masks) == total
    assert sum(int((weight == 0).sum()) for weight in updated) == total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_heavy_ties_and_natural_zeros(method: str, scope: str) -> None:
    weights = [torch.zeros(4, 8), torch.ones(3, 5)]
    gradients = [torch.ones(6, 4, 8), torch.ones(6, 3, 5)]
    for sparsity in (0.1, 0.5, 0.9):
        masks, updated = prune64(weights, gradients, method=method, sparsity=sparsity, scope=scope, block=8)
        if scope == "global":
            assert zeros(masks) == round(sparsity * 47)
        else:
            assert [zeros([mask]) for mask in masks] == [round(sparsity * 32), round(sparsity * 15)]
        assert all((weight[~mask] == 0).all() for weight, mask in zip(updated, masks, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_natural_zeros_are_cheapest(method: str) -> None:
    weights, gradients = random_problem((6, 10), seed=1)
    weights[0][::2, ::3] = 0
    natural = weights[0] == 0
    masks, updated = prune64(weights, gradients, method=method, sparsity=0.3, block=10)
    assert not masks[0][natural][: int(zeros(masks))].any()
    assert (~masks[0] & natural).sum() == min(zeros(masks), int(natural.sum()))
    assert ((updated[0] == 0) == ~masks[0]).sum() >= 60 - int(natural.sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_what_was_pruned_stays_and_counts(method: str, scope: str) -> None:
    weights, gradients = random_problem((6, 8), (3, 7), seed=2)
    before = [torch.rand(w.shape, generator=torch.Generator().manual_seed(3)) > 0.4 for w in weights]
    options: Any = {"method": method, "masks": before, "scope": scope, "block": 8}
    masks, updated = prune64(weights, gradients, sparsity=0.8, **options)
    assert zeros(masks) == (round(0.8 * 69) if scope == "global" else round(0.8 * 48) + round(0.8 * 21))
    assert all(not (new & ~old).any() for new, old in zip(masks, before, strict=True))
    assert all((weight[~mask] == 0).all() for weight, mask in zip(updated, masks, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.3), ({"block": [1, 2]}, 0.1), ("2:4", None)])
def test_a_target_already_reached_changes_nothing(method: str, pattern: Any, sparsity: float | None) -> None:
    weights, gradients = random_problem((6, 8), seed=4, dtype=torch.float32)
    first_masks, first = prune64(weights, gradients, method=method, pattern="2:4", block=8)
    options: Any = {"method": method, "pattern": pattern, "sparsity": sparsity, "block": 8}
    masks, again = prune64(first, [gradient * 3 for gradient in gradients], masks=first_masks, **options)
    assert masks[0].equal(first_masks[0])
    assert again[0].equal(first[0])


def test_blocks_that_lose_nothing_keep_every_bit() -> None:
    weights, gradients = random_problem((2, 8), seed=5)
    weights[0][1] *= 1e6
    masks, updated = prune64(weights, gradients, sparsity=0.25, block=8)
    assert masks[0][1].all()
    assert updated[0][1].equal(weights[0][1])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    sizes=st.lists(st.sampled_from([1, 2, 7, 13, 31, 64, 97, 101]), min_size=1, max_size=3),
    block=st.sampled_from([1, 2, 5, 16, 48, 192]),
    sparsity=st.floats(0, 1),
    zero=st.floats(0, 1),
    pruned=st.floats(0, 1),
    scope=st.sampled_from(["global", "layer"]),
    method=st.sampled_from(sorted(METHODS)),
)
def test_exact_for_every_shape_and_past(
    sizes: list[int], block: int, sparsity: float, zero: float, pruned: float, scope: str, method: str
) -> None:
    weights, gradients = random_problem(*[(size,) for size in sizes], count=5)
    generator = torch.Generator().manual_seed(7)
    weights = [w * (torch.rand(w.shape, generator=generator) >= zero) for w in weights]
    before = [torch.rand(w.shape, generator=generator) >= pruned for w in weights]
    options: Any = {"sparsity": sparsity, "scope": scope, "method": method, "block": block, "masks": before}
    masks, updated = prune64(weights, gradients, **options)
    if scope == "global":
        assert zeros(masks) == max(zeros(before), round(sparsity * sum(sizes)))
    else:
        for mask, old, size in zip(masks, before, sizes, strict=True):
            assert zeros([mask]) == max(zeros([old]), round(sparsity * size))
    for mask, old, weight in zip(masks, before, updated, strict=True):
        assert not (mask & ~old).any()
        assert (weight[~mask] == 0).all()
        assert weight.isfinite().all()


@given(numel=st.integers(1, 5000), block=st.integers(4, 300), group=st.sampled_from([1, 2, 4]))
def test_15_blocks_cover_everything_once_and_are_nearly_equal(numel: int, block: int, group: int) -> None:
    numel *= group
    runs = partition(numel, block, group)
    place = 0
    for offset, count, size in runs:
        assert offset == place
        assert 0 < size <= block
        assert size % group == 0
        place += count * size
    assert place == numel
    sizes = [size for _, _, size in runs]
    assert max(sizes) - min(sizes) <= group
    assert sum(count for _, count, _ in runs) == -(-(numel // group) // (block // group))


def test_15_rows_hold_whole_blocks_where_the_block_divides_them() -> None:
    assert partition(384 * 10, 192, 1) == [(0, 20, 192)]
    assert partition(65, 64, 1) == [(0, 1, 33), (33, 1, 32)]
    assert partition(7, 48, 1) == [(0, 1, 7)]
    with pytest.raises(ValueError, match="block 3 is smaller than the pattern's group of 4"):
        partition(8, 3, 4)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
def test_15_no_block_is_treated_worse_than_its_neighbours(sparsity: float) -> None:
    """64 * 40 + 8 weights: a trailing block of 8 would be pruned far harder under the cumulative rule."""
    fractions = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(64 * 40 + 8, generator=generator)
        gradient = torch.randn(100, 64 * 40 + 8, generator=generator)
        masks, _ = prune64([weight], [gradient], sparsity=sparsity, block=64, damp=1e-3)
        fractions.append(float((~masks[0][-8:]).double().mean()))
        blocks = [float((~part).double().mean()) for part in masks[0].tensor_split(41)]
        assert abs(blocks[-1] - sum(blocks[:-1]) / 40) < 0.12
    assert abs(sum(fractions) / 6 - sparsity) < 0.12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_blocks_go_whole(method: str, scope: str) -> None:
    weights, gradients = random_problem((6, 8), (4, 4, 2, 3), seed=8)
    options: Any = {"pattern": {"block": [2, 4]}, "method": method, "scope": scope, "block": 16}
    masks, updated = prune64(weights, gradients, sparsity=0.6, **options)
    pattern = parse_pattern({"block": [2, 4]})
    for mask in masks:
        tiles = pattern.to_layout(mask).reshape(-1, 8)
        assert (tiles.all(1) | ~tiles.any(1)).all()
    assert zeros(masks) == 8 * (round(0.6 * 18) if scope == "global" else round(0.6 * 6) + round(0.6 * 12))
    assert all((weight == 0).equal(~mask) for weight, mask in zip(updated, masks, strict=True))


def test_a_tile_pruned_in_part_can_stay() -> None:
    weights, gradients = random_problem((2, 8), seed=9)
    before = torch.ones(2, 8, dtype=torch.bool)
    before[0, :4] = False
    before[1, 0] = False
    weights[0][1] *= 100
    for method in METHODS:
        options: Any = {"pattern": {"block": [1, 4]}, "method": method, "masks": [before], "block": 8}
        masks, updated = prune64(weights, gradients, sparsity=0.5, **options)
        assert masks[0].tolist() == [[False] * 8, [False] + [True] * 7]
        assert updated[0][1, 0] == 0
