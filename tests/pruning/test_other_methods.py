"""The methods that rank weights once equal the reference, and in the limits each other."""

from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import prune64, random_problem, zeros
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ovit_engine.pruning import estimate_memory, matrix_free, memory, prune_by_scores, prune_streamed, prune_tensors
from ovit_engine.pruning.fisher import joint_change

ONCE = ["obert", "mfac", "obd", "grad_weight"]
PATTERNS: list[tuple[Any, float | None]] = [
    ("unstructured", 0.6),
    ("2:4", None),
    ("1:4", 0.75),
    ({"block": [1, 4]}, 0.5),
    ({"block": [2, 2]}, 0.5),
]


def assert_equals_reference(
    method: str, weights: list[Tensor], gradients: list[Tensor], masks: list[Tensor] | None = None, **options: Any
) -> None:
    got_masks, got_weights = prune64(weights, gradients, method=method, masks=masks, **options)
    want_masks, want_weights = reference.prune_once(
        method,
        [weight.numpy() for weight in weights],
        [gradient.numpy() for gradient in gradients],
        masks=None if masks is None else [mask.numpy() for mask in masks],
        **options,
    )
    for got_mask, got, want_mask, want in zip(got_masks, got_weights, want_masks, want_weights, strict=True):
        np.testing.assert_array_equal(got_mask.numpy(), want_mask)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", ONCE)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_17_matrices_and_convolutions(method: str, pattern: Any, sparsity: float | None, scope: str) -> None:
    weights, gradients = random_problem((6, 8), (2, 4, 2, 1), (2, 4), seed=1)
    options = {"pattern": pattern, "sparsity": sparsity, "scope": scope, "damp": 1e-3}
    masks = [torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) > 0.3 for weight in weights]
    for update in ("joint", "independent", "none") if method in ("obert", "mfac") else ("joint",):
        assert_equals_reference(method, weights, gradients, block=12, update=update, **options)
        assert_equals_reference(method, weights, gradients, masks, block=8, update=update, **options)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    method=st.sampled_from(ONCE),
    sizes=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    block=st.integers(1, 16),
    count=st.integers(1, 40),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.77, 1.0]),
    scope=st.sampled_from(["global", "layer"]),
    update=st.sampled_from(["joint", "independent", "none"]),
    pruned=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 1000),
)
def test_17_any_shape_block_and_sparsity(
    method: str,
    sizes: list[int],
    block: int,
    count: int,
    sparsity: float,
    scope: str,
    update: str,
    pruned: float,
    seed: int,
) -> None:
    weights, gradients = random_problem(*[(size,) for size in sizes], count=count, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(weight.shape, generator=generator) >= pruned for weight in weights]
    options: Any = {"block": block, "sparsity": sparsity, "scope": scope, "update": update, "damp": 1e-2}
    assert_equals_reference(method, weights, gradients, masks, **options)


@pytest.mark.parametrize("update", ["joint", "independent", "none"])
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
@pytest.mark.parametrize("count", [5, 40])
def test_12_mfac_is_obert(pattern: Any, sparsity: float | None, update: str, count: int) -> None:
    weights, gradients = random_problem((8, 24), (4, 8), count=count, seed=3)
    options: Any = {"pattern": pattern, "sparsity": sparsity, "update": update, "block": 24, "damp": 1e-2}
    masks, dense = prune64(weights, gradients, method="obert", **options)
    same, free = prune64(weights, gradients, method="mfac", **options)
    for index in range(2):
        assert same[index].equal(masks[index])
        torch.testing.assert_close(free[index], dense[index], rtol=1e-10, atol=1e-10)


def test_11_blocks_of_one_are_all_optimal_brain_damage() -> None:
    weights, gradients = random_problem((5, 7), (9,), seed=4)
    options: Any = {"sparsity": 0.4, "block": 1, "damp": 1e-2}
    masks, updated = prune64(weights, gradients, method="obd", **options)
    for method in ("ovit", "obert", "mfac"):
        same_masks, same = prune64(weights, gradients, method=method, **options)
        for index in range(2):
            assert same_masks[index].equal(masks[index])
            assert same[index].equal(updated[index])


@pytest.mark.parametrize("method", ["obert", "mfac", "obd"])
def test_11_much_damping_or_zero_gradients_are_magnitude(method: str) -> None:
    weights, gradients = random_problem((4, 10), seed=6)
    expected, kept = prune64(weights, None, method="magnitude", sparsity=0.6)
    for options in ({"gradients": gradients, "damp": 1e14}, {"gradients": [0 * g for g in gradients], "damp": 1e-2}):
        masks, updated = prune64(weights, sparsity=0.6, block=10, method=method, **options)
        assert masks[0].equal(expected[0])
        torch.testing.assert_close(updated[0], kept[0], rtol=1e-10, atol=1e-10)


def test_10_grad_weight_does_not_feel_the_scale_of_the_loss() -> None:
    weights, gradients = random_problem((6, 8), (5, 5), seed=5)
    masks, _ = prune64(weights, gradients, method="grad_weight", sparsity=0.5)
    louder, _ = prune64(weights, [1e6 * gradient for gradient in gradients], method="grad_weight", sparsity=0.5)
    assert all(one.equal(other) for one, other in zip(masks, louder, strict=True))


def test_grad_weight_takes_the_absolute_value_inside_of_the_sum() -> None:
    """Gradients that cancel over the samples are no sign of a weight that does nothing (appendix H)."""
    weight = torch.tensor([1.0, 1.0])
    gradients = torch.tensor([[5.0, 1.0], [-5.0, 1.0]])
    (mask,), _ = prune_tensors([weight], [gradients], method="grad_weight", sparsity=0.5)
    assert mask.tolist() == [True, False]  # 10 against 2; outside of the sum it would be 0 against 2
    pruned = prune_streamed([weight], [[gradients]], 2, method="grad_weight", sparsity=0.5)
    assert pruned.errors == [2.0]


@pytest.mark.parametrize("method", ["obert", "mfac", "ovit"])
def test_5_for_the_same_weights_the_joint_update_is_the_best(method: str) -> None:
    """oBERT predicts the sum of what each costs alone; what it really costs is 1/2 d^T F d."""
    for seed in range(4):
        (weight,), (gradient,) = random_problem((12,), count=30, seed=seed)
        F = reference.fisher(gradient.numpy(), 1e-2)
        real = {}
        for update in ("joint", "none") if method == "ovit" else ("joint", "independent", "none"):
            (mask,), (new,) = prune64([weight], [gradient], method=method, sparsity=0.5, damp=1e-2, update=update)
            change = (new - weight).numpy()
            real[update] = change @ F @ change / 2
        assert real["joint"] <= min(real.values()) * (1 + 1e-12)
        Q = (~mask).nonzero().flatten().tolist()
        assert real["joint"] == pytest.approx(reference.group_error(F, weight.numpy(), Q), rel=1e-9)


@pytest.mark.parametrize("method", ONCE)
def test_13_steps_with_fresh_gradients_keep_what_was_pruned(method: str) -> None:
    weights, _ = random_problem((6, 8), (5, 5))
    masks = None
    before = 0
    for step, sparsity in enumerate([0.3, 0.5, 0.5, 0.8]):
        _, gradients = random_problem((6, 8), (5, 5), seed=100 + step)
        options: Any = {"sparsity": sparsity, "block": 8, "damp": 1e-2, "method": method}
        new_masks, new_weights = prune64(weights, gradients, masks=masks, **options)
        assert zeros(new_masks) == round(sparsity * 73)
        for new, old in zip(new_masks, masks or new_masks, strict=True):
            assert not (new & ~old).any()
        if zeros(new_masks) == before:
            assert all(new.equal(old) for new, old in zip(new_weights, weights, strict=True))
        masks, weights, before = new_masks, new_weights, zeros(new_masks)


@pytest.mark.parametrize("method", ONCE)
def test_9_chunks_of_blocks_and_gradients_do_not_matter(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gradients = random_problem((24, 16), (9, 7), count=37, seed=7)
    options: Any = {"sparsity": 0.6, "block": 16, "damp": 1e-3, "dtype": torch.float64, "method": method}
    expected = prune_streamed(weights, [gradients], 37, **options)
    monkeypatch.setattr(matrix_free, "_NUMBERS_CPU", 1)
    for size in (1, 3, 16, 20):
        chunks = list(zip(*(torch.split(gradient, size) for gradient in gradients), strict=True))
        got = prune_streamed(weights, chunks, 37, **options)
        assert got.errors == pytest.approx(expected.errors, rel=1e-9)
        for index in range(2):
            assert got.masks[index].equal(expected.masks[index])
            torch.testing.assert_close(got.weights[index], expected.weights[index], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ONCE)
def test_18_float32_is_finite_where_conditions_are_hopeless(method: str) -> None:
    for power, damp in ((0, 1e-8), (60, 1e-2), (90, 1e-2), (120, 1e-2)):
        weights, gradients = random_problem((8, 64), count=20, seed=2, dtype=torch.float32)
        weights = [weight * 2.0**power for weight in weights]
        for pattern in ("unstructured", {"block": [1, 4]}):
            options: Any = {"sparsity": 0.5, "block": 64, "damp": damp, "pattern": pattern}
            (mask,), (updated,) = prune_tensors(weights, gradients, method=method, **options)
            assert zeros([mask]) == 256
            assert updated.isfinite().all()
    huge = [gradient.sign() * 3e38 for gradient in gradients]
    (mask,), (updated,) = prune_tensors(weights[:1], huge, method=method, sparsity=0.5, block=64, damp=1.0)
    assert zeros([mask]) == 256
    assert updated.isfinite().all()


@pytest.mark.parametrize("method", ["obert", "mfac"])
def test_18_float32_scores_are_those_of_float64(method: str) -> None:
    weights, gradients = random_problem((16, 64), count=100, seed=1, dtype=torch.float32)
    for damp in (1e-1, 1e-3, 1e-5):
        options: Any = {"sparsity": 0.5, "block": 64, "damp": damp, "method": method}
        one, _ = prune_tensors(weights, gradients, **options)
        other, _ = prune_tensors(weights, gradients, dtype=torch.float64, **options)
        assert int((one[0] ^ other[0]).sum()) <= 4  # of 1024: near ties


def test_a_joint_update_of_mfac_is_that_of_the_dense_inverse() -> None:
    (weight,), (gradient,) = random_problem((30,), count=7, seed=8)
    damp = 1e-3
    (mask,), (new,) = prune64([weight], [gradient], method="mfac", sparsity=0.5, block=30, damp=damp)
    inverse = torch.linalg.inv(torch.from_numpy(reference.fisher(gradient.numpy(), damp))).unsqueeze(0)
    change = joint_change(inverse, weight.unsqueeze(0), ~mask.unsqueeze(0), torch.zeros(1))
    torch.testing.assert_close(new[mask], (weight + change[0])[mask], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ONCE)
def test_broken_gradients_are_named(method: str) -> None:
    weights, gradients = random_problem((3, 8), (2, 8))
    gradients[1][13, 1, 5] = float("nan")
    with pytest.raises(ValueError, match=r"fc: non-finite values in gradient 13"):
        prune_streamed(weights, [gradients], 20, names=["head", "fc"], sparsity=0.5, method=method)


def test_memory_by_method(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, numel = [(1024, 192)], 1024 * 192
    for method in ("obd", "grad_weight", "magnitude"):
        assert estimate_memory(shapes, method=method) <= 32 * numel
    assert estimate_memory(shapes, method="obert", block=192) == estimate_memory(shapes, method="ovit", block=192)
    few = estimate_memory(shapes, method="mfac", block=192, gradients=64)
    many = estimate_memory(shapes, method="mfac", block=192, gradients=128)
    assert few >= 64 * numel * 4
    assert many - few >= 64 * numel * 4
    monkeypatch.setattr(memory, "available_memory", lambda device: 100)
    weights, gradients = random_problem((4, 8))
    with pytest.raises(MemoryError, match="use fewer gradients, or leave it out of the targets"):
        prune_tensors(weights, gradients, method="mfac", sparsity=0.5)
    with pytest.raises(ValueError, match="method must be one of"):
        estimate_memory(shapes, method="nope")


def test_by_scores() -> None:
    weights = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0])]
    scores = [torch.tensor([0.0, -3.0, 7.0, -float("inf")]), torch.tensor([-1.0, 2.0])]
    pruned = prune_by_scores(weights, scores, sparsity=0.5)
    assert [mask.tolist() for mask in pruned.masks] == [[True, False, True, False], [False, True]]
    assert [weight.tolist() for weight in pruned.weights] == [[1.0, 0.0, 3.0, 0.0], [0.0, 6.0]]
    again = prune_by_scores(weights, [-score for score in scores], masks=pruned.masks, sparsity=0.5)
    assert all(one.equal(other) for one, other in zip(again.masks, pruned.masks, strict=True))
    infinite, masks = torch.tensor([0.0, float("inf"), float("inf"), 1.0]), [torch.tensor([False, True, True, True])]
    for sign in (1, -1):  # what has gone already is not taken a second time, and one more goes than there are cheap
        pruned = prune_by_scores(weights[:1], [sign * infinite], masks=masks, sparsity=0.75)
        assert zeros(pruned.masks) == 3
        assert not pruned.masks[0][0]
    with pytest.raises(ValueError, match="2 weights but 1 scores"):
        prune_by_scores(weights, scores[:1], sparsity=0.5)
    with pytest.raises(ValueError, match=r"b: scores must be floating point of shape \(2,\)"):
        prune_by_scores(weights, [scores[0], scores[0]], names=["a", "b"], sparsity=0.5)
    with pytest.raises(FloatingPointError, match="b: a score is NaN"):
        prune_by_scores(weights, [scores[0], scores[1] * float("nan")], names=["a", "b"], sparsity=0.5)
