"""The integer arithmetic against written-out numbers and a float64 reference in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovit_engine.quant import (
    INT8_SYMMETRIC,
    UINT8_AFFINE,
    CurrentMinMax,
    MovingAverageMinMax,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
)

tensor = torch.tensor
reals = st.floats(-1e4, 1e4, width=32)


@pytest.mark.parametrize(
    ("minimum", "maximum", "scale", "zero_point"),
    [
        (-1.0, 4.1, 0.02, 50),
        (2.0, 5.1, 0.02, 0),  # a range without zero is widened to hold it
        (-5.1, -2.0, 0.02, 255),
        (0.0, 0.0, 1.0, 0),
    ],
)
def test_affine_parameters(minimum, maximum, scale, zero_point):
    got_scale, got_zero = choose_qparams(tensor(minimum), tensor(maximum), UINT8_AFFINE)
    assert got_scale.item() == pytest.approx(scale, rel=1e-6)
    assert got_zero.item() == zero_point


def test_symmetric_parameters_are_one_per_channel_and_never_zero():
    scale, zero_point = choose_qparams(tensor([-2.54, -0.1, 0.0]), tensor([1.0, 1.27, 0.0]), INT8_SYMMETRIC)
    assert scale.tolist() == pytest.approx([0.02, 0.01, 1.0], rel=1e-6)
    assert zero_point.tolist() == [0, 0, 0]
    assert zero_point.dtype == torch.int32


def test_the_smallest_range_still_has_a_finite_scale():
    scale, _ = choose_qparams(tensor(0.0), tensor(1e-44), UINT8_AFFINE)
    assert scale > 0
    assert torch.isfinite(tensor(1e-44) / scale)


def test_levels_round_half_to_even_then_saturate():
    x = tensor([-3.0, -0.5, 0.0, 0.5, 1.5, 2.5, 400.0])
    levels = quantize(x, tensor(1.0), tensor(1, dtype=torch.int32), UINT8_AFFINE)
    assert levels.tolist() == [0, 1, 1, 1, 3, 3, 255]
    assert levels.dtype == torch.uint8
    values = [-1.0, 0.0, 0.0, 0.0, 2.0, 2.0, 254.0]
    assert dequantize(levels, tensor(1.0), tensor(1)).tolist() == values
    assert fake_quantize(x, tensor(1.0), tensor(1), UINT8_AFFINE).tolist() == values


def test_channels_along_another_axis():
    x = tensor([[1.0, 1.0], [2.0, 2.0]])
    scale, zero_point = tensor([1.0, 0.5]), torch.zeros(2, dtype=torch.int32)
    assert quantize(x, scale, zero_point, INT8_SYMMETRIC, axis=1).tolist() == [[1, 2], [2, 4]]
    assert quantize(x, scale, zero_point, INT8_SYMMETRIC, axis=0).tolist() == [[1, 1], [4, 4]]


@given(st.lists(reals, min_size=1, max_size=20), reals, reals)
@settings(max_examples=60, deadline=None)
def test_rounding_matches_a_float64_reference_and_keeps_zero(values, one, other):
    low, high = min(one, other), max(one, other)
    scale, zero_point = choose_qparams(tensor(low), tensor(high), UINT8_AFFINE)
    x = tensor([*values, 0.0])
    got = fake_quantize(x, scale, zero_point, UINT8_AFFINE)
    assert got[-1] == 0
    # the reference divides in float32, as the ONNX operator does, and does the rest in float64
    with np.errstate(over="ignore"):
        ratio = (x.numpy() / scale.numpy()).astype(np.float64)
    expected = (np.clip(np.rint(ratio) + int(zero_point), 0, 255) - int(zero_point)) * np.float64(scale.item())
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=0)
    inside = x.clamp((0 - zero_point) * scale, (255 - zero_point) * scale)
    assert ((got - inside).abs() <= 0.5001 * scale + 1e-30).all()


def test_the_gradient_passes_inside_and_stops_where_saturated():
    x = tensor([-200.0, -127.4, -1.2, 0.0, 126.9, 127.6], requires_grad=True)
    fake_quantize(x, tensor(1.0), tensor(0, dtype=torch.int32), INT8_SYMMETRIC).backward(torch.arange(1.0, 7.0))
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]


def test_inactive_is_the_identity_for_value_and_gradient():
    x = tensor([0.3, 900.0], requires_grad=True)
    y = fake_quantize(x, tensor(1.0), tensor(0), INT8_SYMMETRIC, active=tensor(False))
    y.sum().backward()
    assert torch.equal(y, x)
    assert x.grad.tolist() == [1.0, 1.0]


def test_a_nan_stays_visible():
    assert fake_quantize(tensor([float("nan")]), tensor(1.0), tensor(0), UINT8_AFFINE).isnan().all()


def test_gradients_of_single_samples_through_vmap():
    def loss(row):
        return fake_quantize(row, tensor(0.5), tensor(0), INT8_SYMMETRIC).square().sum()

    rows = tensor([[0.6, 90.0], [1.1, -0.2]])
    got = torch.func.vmap(torch.func.grad(loss))(rows)
    assert got.tolist() == [[1.0, 0.0], [2.0, 0.0]]


def test_observers_follow_their_rule():
    seen, minimum, maximum = tensor([[1.0, -3.0], [5.0, 2.0]]), tensor(-1.0), tensor(1.0)
    average = MovingAverageMinMax(momentum=0.25)
    assert [v.item() for v in average.update(seen, minimum, maximum, tensor(True), None)] == [-1.5, 2.0]
    assert [v.item() for v in average.update(seen, minimum, maximum, tensor(False), None)] == [-3.0, 5.0]
    by_row = CurrentMinMax().update(seen, minimum, maximum, tensor(True), 0)
    assert [v.tolist() for v in by_row] == [[-3.0, 2.0], [1.0, 5.0]]
    by_column = CurrentMinMax().update(seen, minimum, maximum, tensor(True), 1)
    assert [v.tolist() for v in by_column] == [[1.0, -3.0], [5.0, 2.0]]
