"""The parts that `diagnose` is made of, each by itself: the search, ranges, weights of two files."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovit_engine.analysis.diagnose import _bisect, _fewest, match_weights, pruned_by
from ovit_engine.analysis.diagnosis import Score
from ovit_engine.analysis.qdq import Layer, Weight, quantizer_range


@given(st.lists(st.sampled_from([0.0, 0.001, 0.5, 1.0, 7.0]), min_size=1, max_size=40))
def test_bisection_finds_every_layer_that_makes_much(noises: list[float]) -> None:
    """Errors add up: layers above a twentieth are found with their own error, the others are 0."""
    names = [str(index) for index in range(len(noises))]
    total = sum(noises)
    calls = []

    def noise_of(group: list[str]) -> float:
        calls.append(group)
        return sum(noises[int(name)] for name in group)

    found = _bisect(names, noise_of, total)
    assert found == {
        name: noise if noise and noise >= 0.05 * total else 0.0 for name, noise in zip(names, noises, strict=True)
    }
    assert len(calls) <= 2 * len(names)


def test_bisection_costs_few_runs_where_one_layer_is_to_blame() -> None:
    calls = []

    def noise_of(group: list[str]) -> float:
        calls.append(group)
        return float("37" in group)

    assert _bisect([str(i) for i in range(48)], noise_of, 1.0)["37"] == 1
    assert len(calls) <= 1 + 2 * 6


@given(st.integers(1, 30), st.integers(1, 40))
def test_the_fewest_that_are_enough(total: int, needed: int) -> None:
    def spare(count: int) -> Score:
        return Score(agreement=1.0 if count >= needed else count / 100, noise=0, accuracy=None)

    count, score = _fewest(total, spare)
    assert count == min(needed, total)
    assert score == spare(count)


def test_ranges_by_hand() -> None:
    values = np.array([-1.0, 0.0, 3.0])
    scale, zero = quantizer_range(values, (np.uint8, False), "min_max")
    assert scale == pytest.approx(4 / 255)
    assert zero == 64  # 1 / (4 / 255) = 63.75
    scale, zero = quantizer_range(values, (np.int8, True), "min_max")
    assert (scale, zero) == (pytest.approx(3 / 127), 0)
    scale, zero = quantizer_range(np.array([]), (np.uint8, False), "mse")
    assert np.isfinite(scale)
    assert zero == 0
    many = np.append(np.linspace(0, 1, 100_000), 1e5)
    assert quantizer_range(many, (np.uint8, False), "percentile")[0] == pytest.approx(1 / 255, rel=1e-2)


def test_least_error_beats_the_extremes() -> None:
    values = np.append(np.random.default_rng(0).standard_normal(50_000), 30.0)

    def error(observer: str) -> float:
        scale, zero = quantizer_range(values, (np.uint8, False), observer)
        levels = np.clip(np.rint(values / scale) + int(zero), 0, 255)
        return float(np.square((levels - int(zero)) * scale - values).sum())

    assert error("mse") < 0.95 * error("min_max")


def layer(name: str, values: np.ndarray, op: str = "MatMul", scale: float | None = None) -> Layer:
    scales = None if scale is None else np.full(values.shape, scale, np.float32)
    return Layer(name, name, op, f"{name}.out", Weight(f"{name}.weight", 1, values, scales), (), op == "Gemm")


def test_weights_are_matched_by_name_then_by_order() -> None:
    one, two = np.arange(6.0).reshape(2, 3), np.ones((3, 4))
    layers = [layer("a", one), layer("b", two)]
    # a Gemm stores [out, in]
    found = match_weights(layers, [layer("b", two.T, "Gemm"), layer("a", one * 2)])
    assert isinstance(found, dict)
    np.testing.assert_array_equal(found["a.out"], one * 2)
    np.testing.assert_array_equal(found["b.out"], two)
    found = match_weights(layers, [layer("x", one * 3), layer("y", two)])
    assert isinstance(found, dict)
    np.testing.assert_array_equal(found["a.out"], one * 3)
    assert match_weights(layers, [layer("a", one)]) == "the reference has no weight 'b'"
    assert match_weights(layers, [layer("a", two), layer("b", two)]) == "'a' is [2, 3], in the reference [3, 4]"


def test_a_small_value_that_rounded_to_zero_is_not_pruned() -> None:
    weight = layer("a", np.array([[0.0, 0.0, 0.1]]), scale=0.1).weight
    assert weight
    np.testing.assert_array_equal(pruned_by(weight, np.array([[0.05, 0.06, 0.1]])), [[False, True, False]])
    weight = layer("a", np.array([[0.0, 0.0]])).weight
    assert weight
    np.testing.assert_array_equal(pruned_by(weight, np.array([[1e-9, 0.0]])), [[True, False]])
