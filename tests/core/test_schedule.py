"""Time in steps, and curves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovit_engine import Clock
from ovit_engine.core.schedule import CURVES, Cyclic, Schedule, check_time

CLOCK = Clock(steps_per_epoch=7, total_steps=70)


@pytest.mark.parametrize(
    ("time", "steps"),
    [
        ("0ep", 0),
        ("300st", 300),
        ("2ep", 14),
        ("2.5ep", 18),  # 17.5: half a step is rounded up
        ("0.5ep", 4),
        ("0.07ep", 0),
        ("100%", 70),
        ("40%", 28),
        ("0.5%", 0),
        ("25%", 18),
        (" 3st ", 3),
    ],
)
def test_times_become_steps(time: str, steps: int) -> None:
    assert CLOCK.steps(time) == steps


@pytest.mark.parametrize(
    ("time", "why"),
    [
        ("3", "write steps '300st'"),
        ("3epochs", "write steps '300st'"),
        ("3 ep", "epochs '2.5ep'"),
        ("-1ep", "a share of training '40%'"),
        ("1e3st", "write steps"),
        (".5ep", "write steps"),
        ("", "write steps"),
        ("2.5st", "steps are whole numbers"),
        ("101%", "at most 100%"),
        (3, "3 is no time"),
        (2.5, "2.5 is no time"),
        (True, "True is no time"),
        (False, "False is no time"),
        (None, "None is no time"),
    ],
)
def test_wrong_units(time: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_time(time)


def test_a_bare_zero_is_a_time() -> None:
    assert check_time(0) == "0st"


@pytest.mark.parametrize(("steps", "total"), [(0, 5), (-1, 5), (2.0, 5), (True, 5), (5, 0), (5, "9")])
def test_a_clock_needs_positive_whole_numbers(steps: object, total: object) -> None:
    with pytest.raises(ValueError, match="must be a positive whole number, not"):
        Clock(steps, total)  # type: ignore[arg-type]


@given(st.integers(1, 10_000), st.integers(1, 1000), st.integers(0, 10**6), st.integers(0, 10**6))
def test_later_times_are_later_steps(per_epoch: int, epochs: int, one: int, two: int) -> None:
    clock = Clock(per_epoch, per_epoch * epochs)
    early, late = sorted((one, two))
    assert clock.steps(f"{early / 1000}ep") <= clock.steps(f"{late / 1000}ep")
    assert clock.steps(f"{epochs}ep") == clock.steps("100%") == clock.total_steps
    assert clock.steps(f"{early}st") == early


def test_the_cubic_curve_is_that_of_zhu_and_gupta() -> None:
    schedule = Schedule(0.4, 0.8, "cubic")
    assert [schedule.value(p) for p in (0, 0.5, 1)] == pytest.approx([0.4, 0.8 + (0.4 - 0.8) * 0.5**3, 0.8])


def test_the_other_curves() -> None:
    assert Schedule(0.4, 0.8).value(0.25) == pytest.approx(0.5)
    assert Schedule(1.0, 3.0, "cosine").value(0.25) == pytest.approx(2 - math.sqrt(0.5))
    assert Schedule(0.4, 0.8, "constant").value(0.0) == 0.8


@pytest.mark.parametrize("name", CURVES)
def test_curves_rise_from_their_start_to_their_end_and_stay(name: str) -> None:
    values = [Schedule(2.0, 5.0, name).value(i / 100) for i in range(-10, 111)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(5.0)
    assert values[0] == (5.0 if name == "constant" else 2.0)
    assert values[:10] == [values[10]] * 10
    assert values[-10:] == [values[-11]] * 10


def test_the_cycle_is_equation_8() -> None:
    cyclic = Cyclic(Schedule(5e-4, 1e-5), period=4)
    expected = [5e-4 - (5e-4 - 1e-5) * (t % 4) / 4 for t in range(12)]
    assert [cyclic.value(t) for t in range(12)] == pytest.approx(expected)


@given(st.integers(1, 200), st.sampled_from(sorted(set(CURVES) - {"constant"})), st.integers(0, 1000))
def test_a_cycle_starts_at_its_maximum_and_never_reaches_its_minimum(period: int, curve: str, step: int) -> None:
    cyclic = Cyclic(Schedule(1.0, 0.01, curve), period)
    assert cyclic.value(step - step % period) == 1.0
    assert 0.01 < cyclic.value(step) <= 1.0
    if (step + 1) % period:  # inside a cycle it falls, by no jump
        assert 0 < cyclic.value(step) - cyclic.value(step + 1) <= 3 / period
