"""Rounding, precision flags, threads and chunks: what must not change the result, and what saves it."""

import math
import subprocess
import sys
from typing import Any

import pytest
import reference
import torch
from cases import prune64, random_problem

from ovit_engine.pruning import METHODS, blocks, fisher, ovit, prune_streamed, prune_tensors
from ovit_engine.pruning.eliminate import eliminate
from ovit_engine.pruning.fisher import joint_change


def true_error(weight: torch.Tensor, old: torch.Tensor, gradients: torch.Tensor, block: int, damp: float) -> float:
    """1/2 d^T F d in float64, block after block."""
    total = 0.0
    change = (weight.double() - old.double()).reshape(-1, block)
    for delta, stack in zip(change, gradients.double().reshape(len(gradients), -1, block).unbind(1), strict=True):
        total += float(((stack @ delta) ** 2).sum() / len(stack) + damp * (delta @ delta)) / 2
    return total


@pytest.mark.parametrize("relative", [1e-1, 1e-3, 1e-5])
def test_18_float32_is_as_good_as_float64(relative: float) -> None:
    (weight,), (gradient,) = random_problem((16, 64), count=100, seed=1, dtype=torch.float32)
    damp = relative * float((gradient**2).mean())
    errors = []
    for dtype in (torch.float32, torch.float64):
        _, (updated,) = prune_tensors([weight], [gradient], sparsity=0.5, block=64, damp=damp, dtype=dtype)
        errors.append(true_error(updated, weight, gradient, 64, damp))
    assert errors[0] <= 1.01 * errors[1]


def test_18_fewer_gradients_than_weights_at_tiny_damping() -> None:
    weights, gradients = random_problem((8, 64), count=20, seed=2, dtype=torch.float32)
    (mask,), (updated,) = prune_tensors(weights, gradients, sparsity=0.75, block=64, damp=1e-8)
    assert int((~mask).sum()) == 384
    assert updated.isfinite().all()


SETTINGS = {
    "default": "pass",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "high": "torch.set_float32_matmul_precision('high')",
    "allow_tf32": "torch.backends.cuda.matmul.allow_tf32 = True",
    "fp32_precision": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "convolutions": "torch.backends.cudnn.allow_tf32 = False",
    "everywhere": "torch.backends.fp32_precision = 'tf32'",
}
FLAGS = """
import math, torch
from ovit_engine.pruning import block_inverse, prune_tensors
def read(get):
    try:
        return get()
    except RuntimeError:  # the two interfaces were mixed
        return "mixed"
def flags():
    matmul = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    convolutions = torch.backends.cudnn.conv, torch.backends.mkldnn.conv
    old = read(torch.get_float32_matmul_precision), read(lambda: matmul[0].allow_tf32)
    return *old, *(each.fp32_precision for each in (*matmul, *convolutions))
torch.manual_seed(0)
weights, gradients, seen, real = [torch.randn(8, 32)], [torch.randn(40, 8, 32)], set(), block_inverse.absorb
def spy(*arguments):
    seen.add(flags())
    real(*arguments)
block_inverse.absorb = spy
options = dict(sparsity=0.5, block=32, damp=1e-5)
expected = prune_tensors(weights, gradients, **options)[1][0]
for setting in SETTINGS:
    exec(setting)
    before = flags()
    assert prune_tensors(weights, gradients, **options)[1][0].equal(expected), setting
    assert flags() == before, setting
    try:
        prune_tensors(weights, [gradients[0] * math.nan], **options)
    except ValueError:
        pass
    assert flags() == before, setting
    torch.set_float32_matmul_precision("highest")
assert seen == {("highest", False, *["ieee"] * 4)}, seen
"""


def test_18_tf32_flags_change_nothing_and_come_back() -> None:
    """In a process of its own: the flags are global, and PyTorch does not let every state be undone."""
    program = FLAGS.replace("SETTINGS", repr(list(SETTINGS.values())))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_autocast_and_inference_mode_change_nothing() -> None:
    weights, gradients = random_problem((8, 32), count=40, seed=3, dtype=torch.float32)
    options: Any = {"sparsity": 0.5, "block": 32, "damp": 1e-5}
    expected = prune_tensors(weights, gradients, **options)[1][0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prune_tensors(weights, gradients, **options)[1][0].equal(expected)
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        assert prune_tensors(weights, gradients, **options)[1][0].equal(expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_18_broken_gradients_are_named(value: float) -> None:
    weights, gradients = random_problem((3, 8), (2, 8))
    gradients[1][13, 1, 5] = value
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1: non-finite values in gradient 13"):
        prune_streamed(
            weights,
            zip(*(torch.split(g, 6) for g in gradients), strict=True),
            20,
            names=["head", "blocks.0.fc1"],
            sparsity=0.5,
        )
    with pytest.raises(ValueError, match=r"weights\[1\]: non-finite values in gradient 13"):
        prune_tensors(weights, gradients, sparsity=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_broken_weights_are_named(method: str) -> None:
    weights, gradients = random_problem((3, 8), (2, 8))
    weights[1][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"weights\[1\]: non-finite weight"):
        prune_tensors(weights, gradients, sparsity=0.5, method=method)


def test_gradients_whose_sum_overflows_are_fine() -> None:
    weights, gradients = random_problem((3, 8), dtype=torch.float32)
    huge = [gradient.sign() * 3e38 for gradient in gradients]
    (mask,), (updated,) = prune_tensors(weights, huge, sparsity=0.5, damp=1.0)
    assert int((~mask).sum()) == 12
    assert updated.isfinite().all()


def test_18_a_step_that_overflows_in_float32_is_done_in_float64() -> None:
    """g^T H g = 1e42 is beyond float32; what is left of H afterwards is not."""
    inverse = fisher.initial_inverse(1, 2, 1e-2, dtype=torch.float32, device=torch.device("cpu"))
    fisher.absorb(inverse, torch.tensor([[[1e20, 0.0]]]), 1)
    torch.testing.assert_close(inverse, torch.tensor([[[0.0, 0.0], [0.0, 100.0]]]))


def test_18_blocks_beyond_float32_are_eliminated_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition of 1e10: the stored H is indefinite, which is noticed and mended."""
    mended = []
    real = fisher.sound_inverse
    monkeypatch.setattr(ovit, "sound_inverse", lambda *both: mended.append(len(both[0])) or real(*both))
    weights, gradients = random_problem((8, 64), count=20, seed=2, dtype=torch.float32)
    (mask,), (updated,) = prune_tensors(weights, gradients, sparsity=0.6, block=64, damp=1e-8)
    assert mended == [4, 4, 4, 4], "eight blocks, a few at a time, when they are eliminated and when they move"
    _, (exact,) = prune64(weights, gradients, sparsity=0.6, block=64, damp=1e-8)
    assert int((~mask).sum()) == round(0.6 * 512)
    plain = true_error(weights[0] * mask, weights[0], gradients[0], 64, 1e-8)
    assert true_error(updated, weights[0], gradients[0], 64, 1e-8) < 1e-2 * plain
    assert true_error(exact, weights[0], gradients[0], 64, 1e-8) < 1e-2 * plain


@pytest.mark.parametrize("power", [60, 90, 120])
def test_18_weights_whose_squares_overflow(power: int) -> None:
    weights, gradients = random_problem((4, 8), seed=6, dtype=torch.float32)
    options: Any = {"sparsity": 0.5, "block": 8, "damp": 1e-2}
    (mask,), (updated,) = prune_tensors([weight * 2.0**power for weight in weights], gradients, **options)
    assert int((~mask).sum()) == 16
    assert updated.isfinite().all()


@pytest.mark.parametrize("scale", [1e10, 1e18, 1e30])
def test_18_hopeless_conditions_still_give_finite_weights(scale: float) -> None:
    weights, gradients = random_problem((4, 8), seed=6, dtype=torch.float32)
    (mask,), (updated,) = prune_tensors(weights, [g * scale for g in gradients], sparsity=0.5, block=8, damp=1e-8)
    assert int((~mask).sum()) == 16
    assert updated.isfinite().all()


def test_an_inverse_that_rounding_made_indefinite_still_gives_finite_steps() -> None:
    inverse = torch.diag(torch.tensor([1.0, -1e-4, 2.0, 0.5])).unsqueeze(0)
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    alive = torch.ones(1, 4, dtype=torch.bool)
    order, cost, sound = eliminate(inverse, weights, alive, torch.full_like(weights, 0.01))
    assert not sound.any()
    assert sorted(order[0].tolist()) == [0, 1, 2, 3]
    assert (cost >= 0).all()
    assert cost.isfinite().all()
    order, cost, sound = eliminate(inverse, weights, alive[:, :2], torch.full_like(weights, 0.01), unit=2)
    assert not sound.any()
    assert sorted(order[0].tolist()) == [0, 1]
    assert cost.isfinite().all()
    stack = torch.tensor([[[0.0, 300.0, 0.0, 0.0]]])
    fisher.absorb(inverse, stack, 1)
    assert inverse.isfinite().all()


def test_an_update_with_an_indefinite_inverse_is_solved_nearby() -> None:
    near, lowest = torch.ones(1, 3, 3) - torch.eye(3) * 1e-6, torch.tensor([1e-3])
    removed = torch.tensor([[True, True, False]])
    change = joint_change(near, torch.tensor([[1.0, 1.0, 0.5]]), removed, lowest)
    torch.testing.assert_close(change, -torch.ones(1, 3), rtol=1e-2, atol=1e-2)
    with pytest.raises(FloatingPointError, match="more damping"):
        joint_change(near * math.nan, torch.ones(1, 3), removed, lowest)


def test_9_chunks_of_blocks_and_gradients_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gradients = random_problem((24, 16), (9, 7), count=37, seed=7)
    options: Any = {"sparsity": 0.6, "block": 16, "damp": 1e-3, "dtype": torch.float64}
    expected = prune_streamed(weights, [gradients], 37, **options)
    for step, size in [(1, 1), (5, 3), (7, 16), (100, 20), (3, 37)]:
        monkeypatch.setattr(blocks, "blocks_a_chunk", lambda *_, step=step: step)
        chunks = list(zip(*(torch.split(gradient, size) for gradient in gradients), strict=True))
        got = prune_streamed(weights, chunks, 37, **options)
        for index in range(2):
            assert got.masks[index].equal(expected.masks[index])
            torch.testing.assert_close(got.weights[index], expected.weights[index], rtol=1e-9, atol=1e-10)


def test_9_permuted_blocks_give_permuted_results() -> None:
    weights, gradients = random_problem((12, 16), count=30, seed=8)
    turn = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    masks, updated = prune64(weights, gradients, sparsity=0.6, block=16, damp=1e-3)
    turned_masks, turned = prune64([weights[0][turn]], [gradients[0][:, turn]], sparsity=0.6, block=16, damp=1e-3)
    assert turned_masks[0].equal(masks[0][turn])
    torch.testing.assert_close(turned[0], updated[0][turn], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_19_threads_and_repetition(dtype: torch.dtype) -> None:
    weights, gradients = random_problem((48, 64), count=40, seed=9, dtype=torch.float32)
    options: Any = {"sparsity": 0.7, "block": 64, "damp": 1e-4, "dtype": dtype}
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 4, 1):
            torch.set_num_threads(number)
            results.append(prune_tensors(weights, gradients, **options))
    finally:
        torch.set_num_threads(threads)
    for masks, updated in results[1:]:
        assert masks[0].equal(results[0][0][0])
        torch.testing.assert_close(updated[0], results[0][1][0], rtol=1e-5, atol=1e-6)


def test_19_an_event_run_again_from_saved_weights_gives_the_same(tmp_path: Any) -> None:
    weights, gradients = random_problem((8, 16), (5, 9), seed=10, dtype=torch.float32)
    masks, weights = prune_tensors(weights, gradients, sparsity=0.4, block=16)
    torch.save({"masks": masks, "weights": weights}, tmp_path / "state.pt")
    expected = prune_tensors(weights, gradients, masks=masks, sparsity=0.7, block=16)
    state = torch.load(tmp_path / "state.pt")
    again = prune_tensors(state["weights"], gradients, masks=state["masks"], sparsity=0.7, block=16)
    for one, other in zip(expected[0] + expected[1], again[0] + again[1], strict=True):
        assert one.equal(other)


def test_reference_and_solver_agree_in_float32_on_the_easy_case() -> None:
    weights, gradients = random_problem((4, 12), seed=11, dtype=torch.float32)
    masks, updated = prune_tensors(weights, gradients, sparsity=0.5, block=12, damp=0.1)
    options: Any = {"sparsity": 0.5, "block": 12, "damp": 0.1}
    want_masks, want = reference.prune([weights[0].double().numpy()], [gradients[0].double().numpy()], **options)
    assert masks[0].numpy().tolist() == want_masks[0].tolist()
    torch.testing.assert_close(updated[0].double(), torch.from_numpy(want[0]), rtol=1e-4, atol=1e-5)
