"""Connections that move: against a plain search in float64, exact in number whatever ties and zeros there are."""

import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ovit_engine.pruning import prune_by_scores
from ovit_engine.pruning.patterns import Pattern, parse_pattern
from ovit_engine.pruning.problem import erk_counts
from ovit_engine.pruning.rewire import random_scores, rewire

FREE = parse_pattern("unstructured")


def moved(weight: Tensor, mask: Tensor, gain: Tensor, pattern: Pattern = FREE, fraction: float = 0.5) -> Tensor:
    return rewire(weight, mask, gain, pattern=pattern, fraction=fraction, name="w")


def test_a_written_out_update() -> None:
    weight = torch.tensor([[0.5, -0.1, 0.2, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False, False, False]])
    gain = torch.tensor([[9.0, 0.3, 0.1, 0.2, 0.4, 0.0]])
    # ceil(0.5 * 3) = 2 go: 0.1 and 0.2; 0.4 and 0.3 are the largest gains left, so that the second comes back
    assert moved(weight, mask, gain).tolist() == [[True, True, False, False, True, False]]
    assert moved(weight, mask, gain, fraction=0.0).equal(mask)
    assert moved(weight, mask, gain, fraction=0.01).tolist() == [[True, False, True, False, True, False]]
    # under 2:4 the smallest go wherever they are, and come back in their group
    pair = torch.tensor([[3.0, 2.0, 0.0, 0.0, 0.1, 0.2, 0.0, 0.0]])
    promise = torch.tensor([[0.0, 0.0, 9.0, 9.0, 0.0, 0.1, 0.2, 0.3]])
    new = moved(pair, pair != 0, promise, parse_pattern("2:4"))
    assert new.tolist() == [[True, True, False, False, False, False, True, True]]


def test_ties_go_by_position() -> None:
    ones = torch.ones(2, 4)
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    new = moved(ones, mask, torch.zeros(2, 4))  # the first two go, the first two empty places are filled
    assert new.tolist() == [[True, True, False, True], [False, True, False, False]]


# --- a plain search, in numpy and float64, that shares nothing with the code


def units_of(shape: tuple[int, ...], spelling: object) -> tuple[list[list[int]], int]:
    """Flat indices of each unit in the order of the hardware, and how many units make a group (0: no groups)."""
    index = np.arange(math.prod(shape)).reshape(shape)
    rows = index.reshape(1, -1) if len(shape) < 2 else np.moveaxis(index, 1, -1).reshape(shape[0], -1)
    if spelling == "unstructured":
        return [[i] for i in index.ravel().tolist()], 0
    if isinstance(spelling, str):
        return [[i] for i in rows.ravel().tolist()], int(spelling.split(":")[1])
    height, width = spelling["block"]  # type: ignore[index]
    tiles = [
        rows[top : top + height, left : left + width].ravel().tolist()
        for top in range(0, rows.shape[0], height)
        for left in range(0, rows.shape[1], width)
    ]
    return tiles, 0


def searched(weight: Tensor, mask: Tensor, gain: Tensor, spelling: object, fraction: float) -> Tensor:
    tiles, group = units_of(tuple(weight.shape), spelling)
    w, g, there = (t.numpy().astype(np.float64).ravel() for t in (weight, gain, mask))
    alive = {unit for unit, tile in enumerate(tiles) if any(there[i] for i in tile)}
    goes = sorted(alive, key=lambda unit: (sum(abs(w[i]) for i in tiles[unit]), unit))
    dropped = set(goes[: math.ceil(fraction * len(alive))])
    left = alive - dropped
    new = set(left)
    for start in range(0, len(tiles), group or len(tiles)):
        members = range(start, start + (group or len(tiles)))
        lost = sum(unit in dropped for unit in members)
        empty = [unit for unit in members if unit not in left]
        new |= set(sorted(empty, key=lambda unit: (-sum(g[i] for i in tiles[unit]), unit))[:lost])
    flat = np.zeros(weight.numel(), dtype=bool)
    flat[[i for unit in new for i in tiles[unit]]] = True
    return torch.from_numpy(flat).reshape(weight.shape)


PATTERNS = ["unstructured", "2:4", "1:4", {"block": [2, 2]}, {"block": [1, 4]}]


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    spelling=st.sampled_from(PATTERNS),
    shape=st.sampled_from([(4, 8), (2, 4), (8, 12), (4, 8, 3, 3), (2, 16, 1, 1), (2, 4, 2)]),
    sparsity=st.floats(0, 0.95),
    fraction=st.floats(0, 1),
    levels=st.sampled_from([0, 2, 50]),
    seed=st.integers(0, 99),
)
def test_any_update(
    spelling: object, shape: tuple[int, ...], sparsity: float, fraction: float, levels: int, seed: int
) -> None:
    """Numbers of few levels, so that sums are exact and ties are everywhere; with 0 all gains are zero."""
    generator = torch.Generator().manual_seed(seed)
    pattern = parse_pattern(spelling)
    weight = torch.randint(-3, 4, shape, generator=generator).float()
    gain = torch.randint(0, levels + 1, shape, generator=generator).float()
    mask = pattern.mask(
        torch.rand(shape, generator=generator), None if isinstance(spelling, str) and ":" in spelling else sparsity
    )
    weight = weight * mask
    new = moved(weight, mask, gain, pattern, fraction)
    assert new.equal(searched(weight, mask, gain, spelling, fraction))
    assert new.sum() == mask.sum()
    if isinstance(spelling, str) and ":" in spelling:
        keep, group = map(int, spelling.split(":"))
        rows = new.movedim(1, -1).reshape(-1, group)
        assert (rows.sum(1) == keep).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gain = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(16, 16, generator=generator) < 0.5
    new = moved(weight, mask, gain.abs(), fraction=0.3)
    assert new.equal(searched(weight.double(), mask, gain.abs().double(), "unstructured", 0.3))


def test_an_infinite_gain_comes_first_and_never_twice() -> None:
    weight, mask = torch.tensor([[1.0, 2.0, 0.0, 0.0]]), torch.tensor([[True, True, False, False]])
    assert moved(weight, mask, torch.tensor([[0.0, torch.inf, 0.0, torch.inf]])).tolist() == [
        [False, True, False, True]
    ]


def test_an_infinite_weight_is_there_all_the_same() -> None:
    weight, mask = torch.tensor([[0.0, torch.inf, 1.0, 0.0]]), torch.tensor([[False, True, True, False]])
    gain = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    assert moved(weight, mask, gain, fraction=1.0).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize(("what", "index"), [("weight", 0), ("gradient", 1)])
def test_nan_is_an_error(what: str, index: int) -> None:
    tensors = [torch.ones(2, 2), torch.ones(2, 2)]
    tensors[index][0, 1] = torch.nan
    with pytest.raises(FloatingPointError, match=rf"^w: a {what} is NaN"):
        moved(tensors[0], torch.eye(2, dtype=torch.bool), tensors[1])


def test_random_scores_depend_on_name_and_seeds_alone() -> None:
    shape = torch.Size((3, 5))
    first = random_scores(shape, "a.weight", 0, 7)
    torch.rand(3)
    assert first.equal(random_scores(shape, "a.weight", 0, 7))
    others = [random_scores(shape, "b.weight", 0, 7), random_scores(shape, "a.weight", 1, 7)]
    assert not any(first.equal(each) for each in [*others, random_scores(shape, "a.weight", 0, 8)])
    assert 0 <= float(first.min()) <= float(first.max()) < 1


# --- where it starts: Erdos-Renyi kernel

ORACLE = {  # specs/structured-and-tokens.md §2.1
    ("deit_small_patch16_224", 0.5): {"patch_embed": 0.206, "qkv": 0.504, "proj": 0.756, "fc": 0.472, "head": 0.523},
    ("deit_small_patch16_224", 0.4): {"patch_embed": 0.165, "qkv": 0.403, "proj": 0.604, "fc": 0.378, "head": 0.418},
    ("deit_base_patch16_224", 0.5): {"patch_embed": 0.392, "qkv": 0.499, "proj": 0.749, "fc": 0.468, "head": 0.662},
}


@pytest.mark.parametrize(("name", "density"), ORACLE)
def test_densities_of_the_published_initialisation(name: str, density: float) -> None:
    """U1: over all matrices and the patch embedding, exact in all."""
    with torch.device("meta"):
        model = timm.create_model(name)
    weights = {name: p for name, p in model.named_parameters() if p.ndim in (2, 4) and name.endswith("weight")}
    sizes = [p.numel() for p in weights.values()]
    kept = erk_counts([p.shape for p in weights.values()], sizes, round(density * sum(sizes)))
    assert sum(kept) == round(density * sum(sizes))
    assert len(weights) == 12 * 4 + 2
    for (weight, size), count in zip(zip(weights, sizes, strict=True), kept, strict=True):
        part = "patch_embed" if weight.startswith("patch_embed") else weight.split(".")[-2].rstrip("12")
        expected = ORACLE[name, density][part]
        assert count / size == pytest.approx(expected, abs=1e-3), weight


def test_a_random_start_is_exact() -> None:
    """Not by one throw of a coin a weight, as released, which is right on average only."""
    shapes = [torch.Size(shape) for shape in ((32, 16), (8, 4, 3, 3), (4, 4))]
    weights = [torch.ones(shape) for shape in shapes]
    scores = [random_scores(shape, str(index), 0, 0) for index, shape in enumerate(shapes)]
    masks = prune_by_scores(weights, scores, sparsity=0.7, scope="erk").masks
    total = sum(shape.numel() for shape in shapes)
    kept = erk_counts(shapes, [shape.numel() for shape in shapes], total - round(0.7 * total))
    assert [int(mask.sum()) for mask in masks] == kept
