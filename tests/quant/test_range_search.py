"""Ranges against references in float64 NumPy that share no code with them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from ovit_engine.quant import (
    INT7_SYMMETRIC,
    INT8_ACTIVATION,
    INT8_SYMMETRIC,
    UINT8_AFFINE,
    LeastError,
    MinMax,
    Percentile,
    choose_qparams,
    extremes,
    least_error_range,
    percentile_range,
    quantize,
)

LIMITS = {"uint8": (UINT8_AFFINE, 0, 255), "int8": (INT8_ACTIVATION, -128, 127), "int7": (INT7_SYMMETRIC, -63, 63)}


def samples(seed: int, size: int, tails: float) -> np.ndarray:
    """Values whose tails are as heavy as Student's t with ``tails`` degrees of freedom."""
    return np.random.default_rng(seed).standard_t(tails, size).astype(np.float32)


def squared_error(x: np.ndarray, low: float, high: float, kind: str) -> float:
    """Of rounding to the levels of [low, high], as Jacob et al. write it."""
    _, least, most = LIMITS[kind]
    x = x.astype(np.float64)
    if kind == "uint8":
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / 255
        zero = round(-low / step)
    else:
        step, zero = max(-low, high) / most, 0
    levels = np.clip(np.rint(x / step) + zero, least, most)
    return float((((levels - zero) * step - x) ** 2).sum())


@given(st.integers(0, 10_000), st.integers(1, 400), st.sampled_from([90.0, 99.0, 99.9, 100.0]))
@settings(max_examples=60, deadline=None)
def test_percentiles_leave_out_a_whole_number_of_values_at_each_end(seed: int, size: int, percentile: float) -> None:
    x = samples(seed, size, 3.0)
    ordered = sorted(x.tolist())
    left_out = int(size * round(1000 * (100 - percentile)) / 1e5)
    low, high = percentile_range(torch.from_numpy(x), percentile)
    assert (low.item(), high.item()) == (ordered[left_out], ordered[-1 - left_out])


def test_percentiles_by_hand() -> None:
    x = torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    assert [value.item() for value in percentile_range(x, 99.9)] == [1.0, 998.0]
    assert [value.item() for value in percentile_range(x, 99.99)] == [0.0, 999.0]
    low, high = percentile_range(x.view(2, 500).sort().values, 90.0, axis=1)
    assert (low.shape, high.shape) == ((500,), (500,))
    low, high = percentile_range(torch.arange(20.0).view(2, 10), 90.0, axis=0)
    assert (low.tolist(), high.tolist()) == ([1.0, 11.0], [8.0, 18.0])


@given(st.integers(0, 10_000), st.floats(1.2, 30.0), st.sampled_from(["uint8", "int8", "int7"]), st.floats(-2, 2))
@settings(max_examples=40, deadline=None)
def test_the_least_error_range_is_nearly_the_best_of_all(seed: int, tails: float, kind: str, shift: float) -> None:
    x = samples(seed, 3000, tails) + np.float32(shift)
    low, high = (value.item() for value in least_error_range(torch.from_numpy(x), LIMITS[kind][0]))
    reached = squared_error(x, low, high, kind)
    bottom, top = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    shares = np.linspace(0.2, 1.0, 33)
    # the search sees a histogram: an error of 2 % of the rounding error
    assert reached <= 1.02 * squared_error(x, bottom, top, kind) + 1e-12
    pairs = [(bottom * a, top * b) for a in shares for b in (shares if kind == "uint8" else [a])]
    assert reached <= 1.05 * min(squared_error(x, *pair, kind) for pair in pairs if max(-pair[0], pair[1]) > 0) + 1e-12


def test_one_outlier_is_cut_off_where_calculus_says() -> None:
    """Rounding n values costs n (h / 255)^2 / 12, cutting the outlier at h costs (4 - h)^2: least at this h."""
    count = 1_000_000
    x = torch.cat([torch.linspace(0, 1, count), tensor([4.0])])
    low, high = least_error_range(x, UINT8_AFFINE)
    assert low.item() == 0.0
    assert high.item() == pytest.approx(4 / (1 + count / (12 * 255**2)), rel=0.03)
    assert [value.item() for value in extremes(x)] == [0.0, 4.0]


def test_a_channel_with_an_outlier_is_cut_off_and_its_neighbour_is_not() -> None:
    count = 200_000
    outlier, even = torch.linspace(-1, 1, count), torch.linspace(-1, 1, count)
    outlier[0] = 4.0
    low, high = least_error_range(torch.stack([outlier, even]), INT8_SYMMETRIC, axis=0)
    reach = torch.maximum(-low, high)
    assert reach[0].item() == pytest.approx(4 / (1 + count / (12 * 127**2)), rel=0.06)
    assert reach[1].item() == 1.0


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_channels_are_searched_each_for_itself(seed: int, channels: int, length: int) -> None:
    x = torch.from_numpy(samples(seed, channels * length, 2.0)).view(channels, length)
    low, high = least_error_range(x, INT8_SYMMETRIC, axis=0)
    for index in range(channels):
        reached = squared_error(x[index].numpy(), low[index].item(), high[index].item(), "int8")
        assert reached <= squared_error(x[index].numpy(), x[index].min().item(), x[index].max().item(), "int8") + 1e-10
        alone = least_error_range(x[index : index + 1], INT8_SYMMETRIC, axis=0)
        assert (alone[0].item(), alone[1].item()) == (low[index].item(), high[index].item())


@pytest.mark.parametrize("grid", [UINT8_AFFINE, INT8_ACTIVATION])
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_constant_tensor_is_held_exactly(grid, value) -> None:
    x = torch.full((50,), value)
    low, high = least_error_range(x, grid)
    scale, zero_point = choose_qparams(low, high, grid)
    back = (quantize(x, scale, zero_point, grid).float() - zero_point) * scale
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "observer", [MinMax(), Percentile(), LeastError(grid=UINT8_AFFINE)], ids=lambda o: type(o).__name__
)
def test_a_tensor_with_no_numbers_gives_no_range(observer, bad) -> None:
    """The quantizer then leaves its own alone; a percentile must not cut the evidence off."""
    x = torch.cat([torch.randn(20_000), tensor([bad])])
    low, high = observer.update(x, tensor(0.0), tensor(0.0), tensor(False), None)
    assert not (torch.isfinite(low) and torch.isfinite(high))


def test_min_max_remembers_all_batches_and_averages_weigh_them() -> None:
    first, second = tensor([-1.0, 3.0]), tensor([-2.0, 1.0])
    low, high = MinMax().update(first, tensor(0.0), tensor(0.0), tensor(False), None)
    assert [v.item() for v in MinMax().update(second, low, high, tensor(True), None)] == [-2.0, 3.0]
    half = Percentile(0.5, 100.0)
    low, high = half.update(first, tensor(0.0), tensor(0.0), tensor(False), None)
    assert [v.item() for v in half.update(second, low, high, tensor(True), None)] == [-1.5, 2.0]


def test_seven_bits_keep_two_products_within_sixteen() -> None:
    """What pmaddubsw adds before it saturates."""
    assert 2 * 255 * INT7_SYMMETRIC.high <= 2**15 - 1 < 2 * 255 * INT8_SYMMETRIC.high
