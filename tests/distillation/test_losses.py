"""The terms of distillation against sums written out in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovit_engine.distillation.losses import hard_loss, soft_loss, token_loss


def by_hand(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """Sum over classes of q log(q / p), image by image."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p = [math.exp(x / temperature) for x in s]
        q = [math.exp(x / temperature) for x in t]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.floats(0.3, 8.0), st.integers(0, 1000))
def test_soft_labels(images: int, classes: int, temperature: float, seed: int) -> None:
    drawn = np.random.default_rng(seed)
    student, teacher = drawn.normal(size=(images, classes)) * 3, drawn.normal(size=(images, classes)) * 3
    found = soft_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert float(found) == pytest.approx(by_hand(student, teacher, temperature), rel=1e-9, abs=1e-12)
    assert float(found) >= -1e-12
    assert float(soft_loss(torch.tensor(teacher), torch.tensor(teacher), temperature)) == pytest.approx(0, abs=1e-12)


def test_soft_labels_push_towards_the_teacher() -> None:
    """The gradient of T^2 KL is T (p - q) / B: of the same size at any temperature, where logits are small."""
    student = torch.tensor([[0.02, 0.0, -0.01]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-0.01, 0.03, 0.0]], dtype=torch.float64)
    for temperature in (1.0, 4.0):
        (grad,) = torch.autograd.grad(soft_loss(student, teacher, temperature), student)
        p, q = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
        assert torch.allclose(grad, temperature * (p - q).detach(), atol=1e-12)
    assert grad[0, 1] < 0 < grad[0, 0]


def test_large_logits_are_finite() -> None:
    student = torch.tensor([[0.0, 2e4]], dtype=torch.float16)
    loss = soft_loss(student, -student)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(2e4, rel=1e-3)


def test_hard_labels() -> None:
    student, teacher = (
        torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[0.0, 0.1, 9.0], [5.0, 1.0, 1.0]]),
    )
    first = -math.log(math.exp(0.0) / (math.exp(1.0) + math.exp(2.0) + 1))
    assert float(hard_loss(student, teacher)) == pytest.approx((first + math.log(3)) / 2, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000), st.data())
def test_tokens(images: int, patches: int, width: int, seed: int, data: st.DataObject) -> None:
    drawn = np.random.default_rng(seed)
    left = data.draw(st.integers(1, patches))
    teacher = drawn.normal(size=(images, patches, width))
    student = drawn.normal(size=(images, left, width))
    origin = np.stack([drawn.permutation(patches)[:left] for _ in range(images)])
    weight = drawn.integers(0, 2, size=(images, left)).astype(float)
    squares = [
        (student[b, m] - teacher[b, origin[b, m]]) ** 2 for b in range(images) for m in range(left) if weight[b, m]
    ]
    expected = float(np.mean(squares)) if squares else 0.0
    found = token_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(origin), torch.tensor(weight))
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    whole = drawn.normal(size=teacher.shape)
    assert float(token_loss(torch.tensor(whole), torch.tensor(teacher))) == pytest.approx(
        float(np.mean((whole - teacher) ** 2)), rel=1e-9
    )


def test_a_weight_learns_nothing_from_the_distance() -> None:
    weight = torch.ones(1, 2, requires_grad=True)
    student = torch.zeros(1, 2, 3, requires_grad=True)
    token_loss(student, torch.ones(1, 2, 3), weight=weight).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is None
    assert student.grad is not None


def test_no_token_left_is_no_distance_and_no_nan() -> None:
    student = torch.ones(1, 2, 3, requires_grad=True)
    loss = token_loss(student, torch.zeros(1, 2, 3), weight=torch.zeros(1, 2))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_maps_have_their_classes_along_axis_one() -> None:
    drawn = np.random.default_rng(0)
    student, teacher = drawn.normal(size=(2, 4, 3, 5)), drawn.normal(size=(2, 4, 3, 5))
    places = [array.transpose(0, 2, 3, 1).reshape(-1, 4) for array in (student, teacher)]
    ours, theirs = torch.tensor(student), torch.tensor(teacher)
    assert float(soft_loss(ours, theirs, 2.0)) == pytest.approx(by_hand(*places, 2.0), rel=1e-9)
    shift = torch.linspace(-3, 3, 5, dtype=torch.float64)  # the same for all classes of a place
    assert float(soft_loss(theirs + shift, theirs)) == pytest.approx(0, abs=1e-12)
    expected = hard_loss(*(torch.tensor(array) for array in places))
    assert float(hard_loss(ours, theirs)) == pytest.approx(float(expected), rel=1e-9)


def test_sequences_have_their_classes_along_the_last_axis() -> None:
    student, teacher = np.random.default_rng(1).normal(size=(2, 2, 3, 5))
    flat = [array.reshape(-1, 5) for array in (student, teacher)]
    ours, theirs = torch.tensor(student), torch.tensor(teacher)
    assert float(soft_loss(ours, theirs)) == pytest.approx(by_hand(*flat, 1.0), rel=1e-9)
    expected = hard_loss(*(torch.tensor(array) for array in flat))
    assert float(hard_loss(ours, theirs)) == pytest.approx(float(expected), rel=1e-9)
