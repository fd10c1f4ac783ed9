"""How a budget of parameters spreads over blocks, on models of several shapes."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Attention, Mlp
from torch import nn

from ovit_engine.structured.gates import GateSite, find_sites
from ovit_engine.structured.selection import spread_evenly


def blocks(*shapes: tuple[int, int]) -> list[GateSite]:
    """Sites of blocks of so many heads and hidden units, 12 wide."""
    with torch.device("meta"):
        layers = [each for heads, units in shapes for each in (Attention(12, heads, attn_head_dim=4), Mlp(12, units))]
        return find_sites(nn.Sequential(*layers))


def gone(sites: list[GateSite], kept: list[int]) -> int:
    return sum((site.count - number) * site.parameters for site, number in zip(sites, kept, strict=True))


SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 30)), min_size=1, max_size=4)


@given(SHAPES, st.floats(0, 1))
def test_at_least_the_budget_goes_and_hardly_more(shapes: list[tuple[int, int]], share: float) -> None:
    sites = blocks(*shapes)
    budget = int(share * sum((site.count - 1) * site.parameters for site in sites))
    kept = spread_evenly(sites, budget)
    assert all(1 <= number <= site.count for number, site in zip(kept, sites, strict=True))
    more = gone(sites, kept) - budget
    fine = any(site.kind == "units" and number > 1 for site, number in zip(sites, kept, strict=True))
    sizes = {kind: max(site.parameters for site in sites if site.kind == kind) for kind in ("heads", "units")}
    assert 0 <= more < (sizes["units"] if fine or budget == 0 else sizes["heads"])


@given(st.integers(1, 5), st.integers(1, 6), st.integers(4, 40), st.floats(0, 0.9))
def test_equal_blocks_lose_the_same_to_within_one_unit(depth: int, heads: int, units: int, share: float) -> None:
    sites = blocks(*[(heads, units)] * depth)
    budget = int(share * sum((site.count - 1) * site.parameters for site in sites))
    kept = spread_evenly(sites, budget)
    by_units = [number for site, number in zip(sites, kept, strict=True) if site.kind == "units"]
    assert max(by_units) - min(by_units) <= 1
    assert by_units == sorted(by_units)


@pytest.mark.parametrize(
    ("name", "share", "heads", "units"),
    [  # 30 % of DeiT-Tiny, 35 and 50 % of DeiT-Small: the published budgets
        ("deit_tiny_patch16_224", 0.30, 2, 524),
        ("deit_small_patch16_224", 0.35, 4, 956),
        ("deit_small_patch16_224", 0.50, 3, 725),
    ],
)
def test_published_budgets(name: str, share: float, heads: int, units: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    sites = find_sites(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    kept = spread_evenly(sites, int(share * total))
    assert {number for site, number in zip(sites, kept, strict=True) if site.kind == "heads"} == {heads}
    by_units = [number for site, number in zip(sites, kept, strict=True) if site.kind == "units"]
    assert abs(sum(by_units) / len(by_units) - units) <= 1
    assert share <= gone(sites, kept) / total < share + 1e-3


def test_more_than_there_is() -> None:
    sites = blocks((2, 3))
    reach = sum((site.count - 1) * site.parameters for site in sites)
    assert spread_evenly(sites, reach) == [1, 1]
    assert spread_evenly(sites, 0) == [2, 3]
    with pytest.raises(ValueError, match=rf"{reach + 1} parameters are more than the {reach} that can go"):
        spread_evenly(sites, reach + 1)
