"""What every method keeps to: pruning in steps under every pattern, ties, rounding, threads, real gradients."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import prune64, random_problem, zeros
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ovit_engine.pruning import METHODS, prune_tensors

SHAPES = [(6, 8), (4, 8, 3, 1), (2, 4)]  # 48, 96 and 8 weights
TILES: list[Any] = [{"block": [1, 4]}, {"block": [2, 2]}, {"block": [2, 4]}]
STEPS = st.lists(st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.77, 0.999, 1.0]), min_size=2, max_size=5).map(sorted)


def tiles(tensor: Tensor, pattern: Any) -> Tensor:
    """[tiles, weights] by index arithmetic of the tests' own."""
    order = reference.layout(tuple(tensor.shape), pattern)
    return tensor.flatten()[torch.tensor(order)].reshape(-1, reference.group_of(pattern))


def step(
    method: str, pattern: Any, masks: list[Tensor] | None, weights: list[Tensor], seed: int, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """A pruning step with gradients of its own, checked for what holds in every one."""
    _, gradients = random_problem(*SHAPES, count=12, seed=seed)
    new_masks, new = prune64(
        weights, gradients, method=method, pattern=pattern, masks=masks, block=16, damp=1e-2, **options
    )
    for mask, old, weight in zip(new_masks, masks or new_masks, new, strict=True):
        assert not (mask & ~old).any(), "a pruned weight came back"
        assert not weight[~mask].any(), "a pruned weight is not zero"
        assert weight.isfinite().all()
    if masks and zeros(masks) == zeros(new_masks):
        assert all(one.equal(other) for one, other in zip(new_masks, masks, strict=True))
        assert all(one.equal(other) for one, other in zip(new, weights, strict=True))
    return new_masks, new


def with_zeros(share: float, seed: int) -> list[Tensor]:
    """Weights of which a share is zero by nature."""
    weights, _ = random_problem(*SHAPES, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return [weight * (torch.rand(weight.shape, generator=generator) >= share) for weight in weights]


@pytest.mark.parametrize("method", METHODS)
@settings(derandomize=True, max_examples=15)
@given(
    steps=STEPS,
    pattern=st.sampled_from(["unstructured", *TILES]),
    scope=st.sampled_from(["global", "layer", "erk"]),
    natural=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_13_exact_after_every_step(
    method: str, steps: list[float], pattern: Any, scope: str, natural: float, seed: int
) -> None:
    weights, unit = with_zeros(natural, seed), reference.group_of(pattern)
    masks: list[Tensor] | None = None
    for number, sparsity in enumerate(steps):
        masks, weights = step(method, pattern, masks, weights, seed + number, sparsity=sparsity, scope=scope)
        sizes = [weight.numel() // unit for weight in weights]
        if scope == "layer":
            assert [zeros([mask]) for mask in masks] == [unit * round(sparsity * size) for size in sizes]
        else:
            assert zeros(masks) == unit * round(sparsity * sum(sizes))
        for mask in masks:
            whole = tiles(mask, pattern)
            assert (whole.all(1) | ~whole.any(1)).all()


@pytest.mark.parametrize("method", METHODS)
@settings(derandomize=True, max_examples=15)
@given(
    first=st.sampled_from([None, 0.0, 0.2, 0.6]),
    patterns=st.sampled_from([["2:4", "2:4", "1:4"], ["3:4", "2:4", "2:4", "1:4", "1:4"], ["1:2", "2:4", "1:4"]]),
    natural=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_13_n_to_m_after_anything(
    method: str, first: float | None, patterns: list[str], natural: float, seed: int
) -> None:
    weights, masks = with_zeros(natural, seed), None
    if first is not None:
        masks, weights = step(method, "unstructured", None, weights, seed, sparsity=first)
    for number, pattern in enumerate(patterns):
        before = masks or [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
        masks, weights = step(method, pattern, masks, weights, seed + 1 + number)
        keep = int(pattern[0])
        for mask, old in zip(masks, before, strict=True):
            assert tiles(mask, pattern).sum(1).equal(tiles(old, pattern).sum(1).clamp(max=keep))


@settings(derandomize=True, max_examples=80)
@given(
    method=st.sampled_from(["magnitude", "obd", "grad_weight"]),
    sizes=st.lists(st.sampled_from([1, 2, 7, 13, 31, 97]), min_size=1, max_size=3),
    sparsity=st.floats(0, 1),
    scope=st.sampled_from(["global", "layer"]),
    pruned=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 1000),
)
def test_17_ties_and_natural_zeros_go_by_position(
    method: str, sizes: list[int], sparsity: float, scope: str, pruned: float, seed: int
) -> None:
    """Small whole numbers, so that equal costs are equal to the last bit in any arithmetic."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randint(-2, 3, (size,), generator=generator).double() for size in sizes]
    gradients = [torch.randint(-1, 2, (4, size), generator=generator).double() for size in sizes]
    masks = [torch.rand(size, generator=generator) >= pruned for size in sizes]
    got, updated = prune64(
        weights, gradients, method=method, sparsity=sparsity, scope=scope, masks=masks, damp=1.0, block=8
    )
    costs = []
    for weight, gradient in zip(weights, gradients, strict=True):
        w, g = weight.tolist(), gradient.tolist()
        factor: dict[str, Any] = {
            "magnitude": lambda i, w=w: abs(w[i]),
            "obd": lambda i, w=w, g=g: w[i] ** 2 * (1 + sum(row[i] ** 2 for row in g) / 4) / 2,
            "grad_weight": lambda i, w=w, g=g: sum(abs(w[i] * row[i]) for row in g),
        }
        costs.append([factor[method](i) for i in range(len(w))])
    want = [mask.tolist() for mask in masks]
    for members in [range(len(sizes))] if scope == "global" else [[t] for t in range(len(sizes))]:
        alive = sorted((costs[t][i], t, i) for t in members for i in range(sizes[t]) if want[t][i])
        total = sum(sizes[t] for t in members)
        for _, t, i in alive[: max(0, round(sparsity * total) - (total - len(alive)))]:
            want[t][i] = False
    assert [mask.tolist() for mask in got] == want
    assert all(new.equal(old * mask) for new, old, mask in zip(updated, weights, got, strict=True))


@pytest.mark.parametrize("method", ["ovit", "obert", "mfac"])
@settings(derandomize=True, max_examples=25)
@given(sparsity=st.floats(0, 1), seed=st.integers(0, 1000), block=st.sampled_from([5, 8, 31, 97]))
def test_ties_of_correlated_weights_are_broken_for_good(method: str, sparsity: float, seed: int, block: int) -> None:
    """Equal weights, equal gradients: which of them go is a matter of rounding; how many is not, and it repeats."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randint(-1, 2, (97,), generator=generator).double(), torch.ones(4, 8, dtype=torch.float64)]
    gradients = [torch.ones(6, 97, dtype=torch.float64), torch.randn(6, 1, 1, generator=generator).expand(6, 4, 8)]
    options: Any = {"method": method, "sparsity": sparsity, "block": block, "damp": 1e-3}
    masks, updated = prune64(weights, gradients, **options)
    assert zeros(masks) == round(sparsity * 129)
    assert all(weight.isfinite().all() for weight in updated)
    again, same = prune64(weights, gradients, **options)
    assert all(one.equal(other) for one, other in zip(again + same, masks + updated, strict=True))


@pytest.fixture(scope="module")
def trained() -> tuple[list[Tensor], list[Tensor]]:
    """Weights of a small trained network and gradients of 24 batches of digits, float64."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    images = nn.functional.avg_pool2d(torch.tensor(digits.images).unsqueeze(1) / 16, 2).flatten(1)
    labels = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert float((model(images).argmax(1) == labels).double().mean()) > 0.85
    weights = [model[0].weight, model[2].weight]
    batches = zip(images[:384].split(16), labels[:384].split(16), strict=True)
    stacks = [torch.autograd.grad(nn.functional.cross_entropy(model(x), y), weights) for x, y in batches]
    return [weight.detach() for weight in weights], [torch.stack(each) for each in zip(*stacks, strict=True)]


@pytest.mark.parametrize("method", ["ovit", "obert", "mfac", "obd", "grad_weight"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", {"block": [1, 4]}])
def test_17_on_the_gradients_of_a_trained_model(
    method: str, pattern: Any, trained: tuple[list[Tensor], list[Tensor]]
) -> None:
    weights, gradients = trained
    options: Any = {"pattern": pattern, "sparsity": 0.5, "block": 16, "damp": 1e-6}
    got_masks, got = prune64(weights, gradients, method=method, **options)
    plain = [weight.numpy() for weight in weights], [gradient.numpy() for gradient in gradients]
    if method == "ovit":
        want_masks, want = reference.prune(*plain, **options)
    else:
        want_masks, want = reference.prune_once(method, *plain, **options)
    for index in range(2):
        np.testing.assert_array_equal(got_masks[index].numpy(), want_masks[index])
        np.testing.assert_allclose(got[index].numpy(), want[index], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["ovit", "obert", "mfac"])
@pytest.mark.parametrize("relative", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_18_float32_costs_no_more_than_one_percent(method: str, relative: float) -> None:
    """The true error 1/2 d^T F d, in float64, of what float32 and float64 chose and moved."""
    (weight,), (gradient,) = random_problem((16, 64), count=100, seed=1, dtype=torch.float32)
    damp = relative * float((gradient**2).mean())
    errors = []
    for dtype in (torch.float32, torch.float64):
        options: Any = {"sparsity": 0.5, "block": 64, "damp": damp, "dtype": dtype, "method": method}
        _, (updated,) = prune_tensors([weight], [gradient], **options)
        change = (updated.double() - weight.double()).unsqueeze(0)
        along = (gradient.double() * change).sum(2)  # rows are blocks
        errors.append(float(along.square().mean(0).sum() + damp * change.square().sum()) / 2)
    assert errors[0] <= 1.01 * errors[1]


PRECISION = """
import torch
from ovit_engine.pruning import METHODS, prune_tensors
torch.manual_seed(0)
weights, gradients = [torch.randn(8, 32)], [torch.randn(40, 8, 32)]
def results():
    return [prune_tensors(weights, gradients, method=m, sparsity=0.5, block=32, damp=1e-5)[1][0] for m in METHODS]
expected = results()
torch.set_float32_matmul_precision("medium")
with torch.autocast("cpu", dtype=torch.bfloat16):
    got = results()
assert torch.get_float32_matmul_precision() == "medium"
for method, one, other in zip(METHODS, expected, got):
    assert one.equal(other), method
"""


def test_18_precision_flags_change_no_method() -> None:
    """In a process of its own: the flags are global, and not every state can be undone."""
    done = subprocess.run([sys.executable, "-c", PRECISION], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", {"block": [1, 4]}])
@pytest.mark.parametrize("method", METHODS)
def test_19_threads_change_no_mask(method: str, pattern: Any) -> None:
    weights, gradients = random_problem((48, 64), count=40, seed=9, dtype=torch.float32)
    options: Any = {"sparsity": 0.5, "block": 64, "damp": 1e-4, "method": method, "pattern": pattern}
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 4, 1):
            torch.set_num_threads(number)
            results.append(prune_tensors(weights, gradients, **options))
    finally:
        torch.set_num_threads(threads)
    for masks, updated in results[1:]:
        assert masks[0].equal(results[0][0][0])
        torch.testing.assert_close(updated[0], results[0][1][0], rtol=1e-4, atol=1e-5)
