"""What the paper proves and the published code measured (specs/second-order.md, section 5); float64, tiny sizes."""

import itertools

import numpy as np
import pytest
import reference
import torch
from cases import prune64, random_problem, zeros
from torch import Tensor

from ovit_engine.pruning.allocation import rank, take_lowest
from ovit_engine.pruning.eliminate import eliminate
from ovit_engine.pruning.fisher import absorb, initial_inverse, joint_change
from ovit_engine.pruning.prune import prune_streamed

SIZE, DAMP = 10, 1e-2


def one_block(seed: int, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights [1, B], gradients [1, N, B], F and H [1, B, B]."""
    (weights,), (gradients,) = random_problem((size,), count=30, seed=seed)
    fisher = torch.from_numpy(reference.fisher(gradients.numpy(), DAMP)).unsqueeze(0)
    return weights.unsqueeze(0), gradients.unsqueeze(0), fisher, torch.linalg.inv(fisher)


def course(inverse: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Order and increments of one block of single weights."""
    alive = torch.ones_like(weights, dtype=torch.bool)
    order, cost, sound = eliminate(inverse, weights, alive, torch.full_like(weights, 1e-12))
    assert sound.all()
    return order[0], cost[0]


def solve(inverse: Tensor, weights: Tensor, goes: Tensor) -> Tensor:
    """The joint change of one block, whose H is sound."""
    return joint_change(inverse, weights, goes, torch.zeros(len(weights)))


def removed(size: int, positions: list[int]) -> Tensor:
    mask = torch.zeros(1, size, dtype=torch.bool)
    mask[0, positions] = True
    return mask


@pytest.mark.parametrize("seed", range(5))
def test_1_single_weight(seed: int) -> None:
    weights, _, fisher, inverse = one_block(seed)
    order, cost = course(inverse, weights)
    w, H = weights[0], inverse[0]
    rho = w**2 / (2 * H.diagonal())
    first = int(rho.argmin())
    assert order[0] == first
    change = solve(inverse, weights, removed(SIZE, [first]))[0]
    torch.testing.assert_close(change, -w[first] / H[first, first] * H[:, first], rtol=1e-10, atol=1e-12)
    assert float(change @ fisher[0] @ change / 2) == pytest.approx(float(rho[first]), rel=1e-10)
    assert float(cost[0]) == pytest.approx(float(rho[first]), rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_2_group_satisfies_the_optimality_conditions(seed: int) -> None:
    weights, _, fisher, inverse = one_block(seed)
    order, cost = course(inverse, weights)
    for k in range(1, SIZE + 1):
        goes = removed(SIZE, order[:k].tolist())
        change = solve(inverse, weights, goes)[0]
        assert (weights[0] + change)[goes[0]].abs().max() < 1e-12
        if k < SIZE:
            assert (fisher[0] @ change)[~goes[0]].abs().max() < 1e-10
        assert float(change @ fisher[0] @ change / 2) == pytest.approx(float(cost[:k].sum()), rel=1e-10)


def test_2_pruned_entries_are_exactly_zero_and_the_error_is_reported() -> None:
    weights, gradients = random_problem((4, 6), (7,), seed=4)
    pruned = prune_streamed(weights, [gradients], 20, sparsity=0.5, block=8, damp=DAMP, dtype=torch.float64)
    for weight, old, mask, gradient, error in zip(
        pruned.weights, weights, pruned.masks, gradients, pruned.errors, strict=True
    ):
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).all()
        total = 0.0
        for block in reference.blocks(tuple(weight.shape), "unstructured", 8):
            delta = (weight - old).flatten()[block].numpy()
            total += delta @ reference.fisher(gradient.flatten(1)[:, block].numpy(), DAMP) @ delta / 2
        assert error == pytest.approx(total, rel=1e-10)


def test_3_weights_depend_on_the_set_not_the_order() -> None:
    """Removing one after the other, in any order, ends where the group formula does."""
    weights, _, fisher, inverse = one_block(7, size=6)
    together = weights[0] + solve(inverse, weights, removed(6, [1, 3, 4]))[0]
    for order in itertools.permutations([1, 3, 4]):
        current, gone = weights[0].clone(), []
        for each in order:
            rest = [i for i in range(6) if i not in gone]
            H = torch.linalg.inv(fisher[0][rest][:, rest])
            at = rest.index(each)
            current[rest] -= current[each] / H[at, at] * H[:, at]
            current[each] = 0
            gone.append(each)
        torch.testing.assert_close(current, together, rtol=0, atol=1e-13)


def test_5_greedy_beside_all_supports() -> None:
    ratios = []
    for seed in range(8):
        weights, _, fisher, inverse = one_block(seed, size=8)
        w, F = weights[0].numpy(), fisher[0].numpy()
        _, cost = course(inverse, weights)
        errors = cost.cumsum(0)
        for k in range(1, 8):
            best = min(reference.group_error(F, w, list(Q)) for Q in itertools.combinations(range(8), k))
            assert errors[k - 1] >= best * (1 - 1e-10)
            ratios.append(float(errors[k - 1]) / best)
            if k == 1:
                assert ratios[-1] == pytest.approx(1)
    assert np.mean(ratios) < 1.4


@pytest.mark.parametrize("seed", range(5))
def test_5_joint_update_is_never_worse_than_zeroing_or_independent_updates(seed: int) -> None:
    weights, _, fisher, inverse = one_block(seed)
    w, F, H = weights[0], fisher[0], inverse[0]
    goes = removed(SIZE, [0, 2, 3, 5, 8])
    joint = solve(inverse, weights, goes)[0]
    zeroing = torch.where(goes[0], -w, 0)
    independent = -(H[:, goes[0]] * (w / H.diagonal())[goes[0]]).sum(1)
    independent[goes[0]] = -w[goes[0]]
    for other in (zeroing, independent):
        assert joint @ F @ joint <= other @ F @ other + 1e-12


def test_6_increments_are_not_negative_and_not_monotone() -> None:
    falls = 0
    for seed in range(10):
        weights, _, _, inverse = one_block(seed)
        _, cost = course(inverse, weights)
        assert (cost >= 0).all()
        falls += int((cost.diff() < 0).sum())
    # Who takes the increments for sorted is wrong: a weight gets cheaper when its correlate has gone.
    assert falls > 0


def curves(count: int, size: int) -> Tensor:
    """Increments of three real blocks."""
    weights, gradients = random_problem((count, size), count=12, seed=11)
    fishers = [reference.fisher(gradients[0][:, i].numpy(), DAMP) for i in range(count)]
    inverse = torch.linalg.inv(torch.from_numpy(np.stack(fishers)))
    return eliminate(inverse, weights[0], torch.ones(count, size, dtype=torch.bool), torch.full((count, size), 1e-12))[
        1
    ]


@pytest.mark.parametrize("total", [0, 1, 5, 9, 17, 18])
def test_8_cumulative_rule_minimises_the_largest_error(total: int) -> None:
    costs = curves(3, 6)
    (taken,) = take_lowest([rank(costs, "cumulative")], total)
    steps = taken.sum(1).tolist()
    assert sum(steps) == total
    assert all(row[:k].all() for row, k in zip(taken, steps, strict=True))
    errors = torch.cat([torch.zeros(3, 1), costs.cumsum(1)], 1)
    largest = max(float(errors[b, k]) for b, k in enumerate(steps))
    every = [ks for ks in itertools.product(range(7), repeat=3) if sum(ks) == total]
    assert largest == pytest.approx(min(max(float(errors[b, k]) for b, k in enumerate(ks)) for ks in every))


@pytest.mark.parametrize("total", [0, 1, 5, 9, 17, 18])
def test_8_marginal_rule_is_the_greedy_sum(total: int) -> None:
    costs = curves(3, 6)
    (taken,) = take_lowest([rank(costs, "marginal")], total)
    steps = [0, 0, 0]
    for _ in range(total):
        open_blocks = [b for b in range(3) if steps[b] < 6]
        # the running maximum: a cheap step behind a dear one comes for free
        steps[min(open_blocks, key=lambda b: float(costs[b, : steps[b] + 1].max()))] += 1
    assert taken.sum(1).tolist() == steps


def test_8_ties_go_by_block_and_step() -> None:
    ranking = torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    (taken,) = take_lowest([ranking], 3)
    assert taken.tolist() == [[True, True, False], [True, False, False]]


def test_10_scaling_and_sign_gauge() -> None:
    weights, gradients = random_problem((6, 8), seed=5)
    options = {"sparsity": 0.5, "block": 8}
    masks, updated = prune64(weights, gradients, damp=DAMP, **options)
    scaled_masks, scaled = prune64([3 * w for w in weights], gradients, damp=DAMP, **options)
    assert scaled_masks[0].equal(masks[0])
    torch.testing.assert_close(scaled[0], 3 * updated[0])
    louder, _ = prune64(weights, [10 * g for g in gradients], damp=100 * DAMP, **options)
    assert louder[0].equal(masks[0])
    sign = torch.where(torch.arange(48).reshape(6, 8) % 3 == 0, -1.0, 1.0)
    turned_masks, turned = prune64([weights[0] * sign], [gradients[0] * sign], damp=DAMP, **options)
    assert turned_masks[0].equal(masks[0])
    torch.testing.assert_close(turned[0], updated[0] * sign)


def test_10_errors_scale_with_the_square_of_the_weights() -> None:
    weights, gradients = random_problem((6, 8), seed=5)
    options = {"sparsity": 0.5, "block": 8, "damp": DAMP, "dtype": torch.float64}
    one = prune_streamed(weights, [gradients], 20, **options)
    three = prune_streamed([3 * w for w in weights], [gradients], 20, **options)
    assert three.errors[0] == pytest.approx(9 * one.errors[0])


def test_11_much_damping_or_zero_gradients_are_magnitude_without_compensation() -> None:
    weights, gradients = random_problem((4, 10), seed=6)
    expected, kept = prune64(weights, None, method="magnitude", sparsity=0.6)
    for options in ({"gradients": gradients, "damp": 1e14}, {"gradients": [0 * g for g in gradients], "damp": DAMP}):
        masks, updated = prune64(weights, sparsity=0.6, block=10, rule="marginal", **options)
        assert masks[0].equal(expected[0])
        torch.testing.assert_close(updated[0], kept[0], rtol=1e-10, atol=1e-10)


def test_11_blocks_of_one_are_optimal_brain_damage() -> None:
    (weight,), (gradient,) = random_problem((5, 7), seed=7)
    masks, updated = prune64([weight], [gradient], sparsity=0.4, block=1, damp=DAMP)
    score = weight**2 * (DAMP + (gradient**2).mean(0)) / 2
    lowest = score.flatten().argsort()[:14]
    assert set(lowest.tolist()) == set((~masks[0]).flatten().nonzero().flatten().tolist())
    assert updated[0].equal(weight * masks[0])


def test_11_diagonal_fisher_moves_nobody() -> None:
    weight = torch.tensor([0.3, -0.2, 0.5, 0.05], dtype=torch.float64)
    gradients = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    masks, updated = prune64([weight], [gradients], sparsity=0.5, block=4, damp=DAMP)
    # w^2 F_jj follows 0.09 * 1, 0.04 * 4, 0.25 * 9, 0.0025 * 16
    assert masks[0].tolist() == [False, True, True, False]
    assert updated[0].equal(weight * masks[0])


@pytest.mark.parametrize("rank", [1, 3, 7, 16])
def test_12_inverse_is_the_same_for_every_rank_and_order(rank: int) -> None:
    _, gradients, fisher, inverse = one_block(8)
    total = gradients.shape[1]
    for stack in (gradients, gradients.flip(1)):
        got = initial_inverse(1, SIZE, DAMP, dtype=torch.float64, device=torch.device("cpu"))
        for few in stack.split(rank, dim=1):
            absorb(got, few, total)
        torch.testing.assert_close(got, inverse, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got @ fisher, torch.eye(SIZE, dtype=torch.float64).unsqueeze(0), rtol=0, atol=1e-10)
        assert (torch.linalg.eigvalsh(got) > 0).all()


def test_12_every_gradient_twice_changes_nothing() -> None:
    weights, gradients = random_problem((4, 8), seed=9)
    masks, updated = prune64(weights, gradients, sparsity=0.5, block=8, damp=DAMP)
    again, twice = prune64(weights, [g.repeat_interleave(2, 0) for g in gradients], sparsity=0.5, block=8, damp=DAMP)
    assert again[0].equal(masks[0])
    torch.testing.assert_close(twice[0], updated[0])


def test_13_two_removals_compose() -> None:
    """Q1, then Q2 on what is left, is Q1 and Q2 at once."""
    weights, _, fisher, inverse = one_block(10)
    together = weights[0] + solve(inverse, weights, removed(SIZE, [0, 4, 7, 9]))[0]
    first = weights[0] + solve(inverse, weights, removed(SIZE, [0, 7]))[0]
    rest = [i for i in range(SIZE) if i not in (0, 7)]
    H = torch.linalg.inv(fisher[0][rest][:, rest]).unsqueeze(0)
    second = first[rest] + solve(H, first[rest].unsqueeze(0), removed(8, [rest.index(4), rest.index(9)]))[0]
    torch.testing.assert_close(second, together[rest], rtol=0, atol=1e-12)


def test_13_steps_with_fresh_gradients_keep_what_was_pruned() -> None:
    weights, _ = random_problem((6, 8), (5, 5))
    masks = None
    before = 0
    for step, sparsity in enumerate([0.3, 0.5, 0.5, 0.8]):
        _, gradients = random_problem((6, 8), (5, 5), seed=100 + step)
        new_masks, new_weights = prune64(weights, gradients, masks=masks, sparsity=sparsity, block=8, damp=DAMP)
        assert zeros(new_masks) == round(sparsity * 73)
        for new, old in zip(new_masks, masks or new_masks, strict=True):
            assert not (new & ~old).any()
        if zeros(new_masks) == before:
            assert all(new.equal(old) for new, old in zip(new_weights, weights, strict=True))
        masks, weights, before = new_masks, new_weights, zeros(new_masks)


def test_16_dead_coordinates_are_decoupled_and_go_first() -> None:
    (weight,), (gradient,) = random_problem((1, 12), seed=12)
    gradient[:, 0, [2, 5]] = 0
    weight[0, [2, 5]] = torch.tensor([10.0, -20.0], dtype=torch.float64)
    options = {"block": 12, "damp": 1e-8, "dtype": torch.float64}
    pruned = prune_streamed([weight], [[gradient]], 20, sparsity=2 / 12, **options)
    assert (~pruned.masks[0][0]).nonzero().flatten().tolist() == [2, 5]
    assert pruned.errors[0] == pytest.approx(1e-8 * (100 + 400) / 2)
    assert pruned.weights[0][0, :2].equal(weight[0, :2])
