"""Tensors in groups: the same result as all together, no more passes over the gradients than said."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from cases import random_problem, zeros
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ovit_engine.pruning import METHODS, Pruned, estimate_memory, memory, plan_pruning, prune_streamed, prune_tensors
from ovit_engine.pruning.blocks import Blocks
from ovit_engine.pruning.memory import Memory, balance, into_groups
from ovit_engine.pruning.patterns import parse_pattern
from ovit_engine.pruning.problem import Options, make_problem

SHAPES = [(24, 48), (16, 32), (8, 4, 3, 3), (12, 16), (5, 8)]
PATTERNS: list[dict[str, Any]] = [
    {"pattern": "unstructured", "sparsity": 0.6},
    {"pattern": "2:4", "sparsity": None},
    {"pattern": {"block": [1, 4]}, "sparsity": 0.5},
]


class Asked:
    """Gradients as a function of indices, in chunks; it remembers for which tensors they were asked."""

    def __init__(self, gradients: Sequence[Tensor], chunk: int = 16) -> None:
        self.gradients, self.chunk = gradients, chunk
        self.asked: list[list[int]] = []

    def __call__(self, indices: list[int]) -> Iterable[list[Tensor]]:
        self.asked.append(indices)
        for start in range(0, len(self.gradients[0]), self.chunk):
            yield [self.gradients[index][start : start + self.chunk].clone() for index in indices]


def limit_of(method: str, options: dict[str, Any], held: float = 0.4) -> int:
    """Bytes that let a share of what is held stay in memory, at least the largest tensor."""
    pattern = parse_pattern(options["pattern"])
    read = Options(pattern=pattern, sparsity=options["sparsity"], block=32, dtype=options.get("dtype", torch.float32))
    need = METHODS[method].memory([torch.Size(shape) for shape in SHAPES], read, 37)
    return need.besides + max(*need.held, int(held * sum(need.held)))


def assert_same(one: Pruned, other: Pruned) -> None:
    for a, b in zip(one.masks + one.weights, other.masks + other.weights, strict=True):
        assert torch.equal(a, b)
    assert one.errors == other.errors


@pytest.mark.parametrize("pruned_before", [False, True])
@pytest.mark.parametrize("options", PATTERNS, ids=lambda options: str(options["pattern"]))
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("method", ["ovit", "obert", "mfac", "obd"])
def test_groups_give_what_one_group_gives(
    method: str, scope: str, options: dict[str, Any], pruned_before: bool
) -> None:
    weights, gradients = random_problem(*SHAPES, count=37, dtype=torch.float32)
    masks = [torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) > 0.2 for w in weights]
    rest: dict[str, Any] = {"method": method, "scope": scope, "block": 32, "damp": 1e-6, **options}
    if pruned_before:
        rest["masks"] = masks
    whole, parts = Asked(gradients), Asked(gradients)
    expected = prune_streamed(weights, whole, 37, **rest)
    got = prune_streamed(weights, parts, 37, memory_limit=limit_of(method, options), **rest)
    assert_same(got, expected)
    assert (len(whole.asked), expected.passes) == (1, 1)
    groups = len({tuple(indices) for indices in parts.asked})
    assert sorted({index for indices in parts.asked for index in indices}) == list(range(5))
    assert groups > 1
    assert groups < 5
    is_local = scope != "global" or options["pattern"] == "2:4" or method == "obd"
    assert got.passes == len(parts.asked) == (groups if is_local else 2 * groups - 1)


@pytest.mark.parametrize("update", ["independent", "none"])
@pytest.mark.parametrize("method", ["obert", "mfac"])
def test_other_updates_in_groups(method: str, update: Any) -> None:
    weights, gradients = random_problem(*SHAPES, count=37, dtype=torch.float32)
    rest: dict[str, Any] = {"method": method, "update": update, "block": 32, "damp": 1e-4, **PATTERNS[0]}
    parts = Asked(gradients)
    got = prune_streamed(weights, parts, 37, memory_limit=limit_of(method, PATTERNS[0]), **rest)
    assert_same(got, prune_streamed(weights, Asked(gradients), 37, **rest))
    groups = len({tuple(indices) for indices in parts.asked})
    assert len(parts.asked) == (groups if update == "none" else 2 * groups - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_that_float32_cannot_do_are_the_same_in_groups(dtype: torch.dtype) -> None:
    """Which blocks were mended in float64 has to be remembered until the gradients have come again."""
    weights, gradients = random_problem(*SHAPES, count=37, dtype=torch.float32)
    for gradient in gradients:
        gradient[:, 0] *= 1e6
    rest: dict[str, Any] = {"block": 32, "damp": 1e-9, "pattern": "unstructured", "sparsity": 0.7, "dtype": dtype}
    got = prune_streamed(weights, Asked(gradients), 37, memory_limit=limit_of("ovit", rest), **rest)
    assert got.passes > 1
    assert_same(got, prune_streamed(weights, Asked(gradients), 37, **rest))


def test_all_gradients_at_hand_need_no_function() -> None:
    weights, gradients = random_problem(*SHAPES, count=37)
    limit = limit_of("ovit", {**PATTERNS[0], "dtype": torch.float64})
    rest: dict[str, Any] = {"sparsity": 0.5, "block": 32, "dtype": torch.float64}
    expected = prune_tensors(weights, gradients, **rest)
    with pytest.raises(MemoryError):
        prune_streamed(weights, [gradients], 37, memory_limit=limit, **rest)
    got = prune_tensors(weights, gradients, memory_limit=limit, **rest)
    assert all(a.equal(b) for a, b in zip(got[0] + got[1], expected[0] + expected[1], strict=True))


def test_a_group_that_loses_nothing_is_not_asked_again() -> None:
    weights, gradients = random_problem((16, 16), (16, 16), (16, 16), count=20)
    weights = [weights[0] * 1e-9, weights[1] * 1e9, weights[2] * 1e9]
    limit = estimate_memory([(16, 16)], block=16) + 16 * 16 * 30
    asked = Asked(gradients)
    pruned = prune_streamed(weights, asked, 20, sparsity=0.2, block=16, damp=1e-2, memory_limit=limit)
    assert zeros(pruned.masks[:1]) == zeros(pruned.masks) == round(0.2 * 768)
    assert asked.asked == [[0], [1], [2], [0]]


def test_a_tensor_that_does_not_fit_is_named() -> None:
    weights, gradients = random_problem((4, 8), (32, 32))
    asked = Asked(gradients)
    with pytest.raises(
        MemoryError, match=r"^large: second-order pruning needs \d+ MiB for this tensor alone, memory_limit is \d+ MiB"
    ):
        prune_streamed(weights, asked, 20, names=["small", "large"], sparsity=0.5, memory_limit=20_000)
    assert not asked.asked
    with pytest.raises(ValueError, match="memory_limit must be positive, is 0"):
        prune_tensors(weights, gradients, sparsity=0.5, memory_limit=0)


def test_chunks_that_come_once_have_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gradients = random_problem((32, 32), (32, 32))
    limit = estimate_memory([(32, 32), (32, 32)], block=48) - 1
    with pytest.raises(MemoryError, match="give the gradients as a function, so that they can come again"):
        prune_streamed(weights, [gradients], 20, sparsity=0.5, memory_limit=limit)
    monkeypatch.setattr(memory, "available_memory", lambda device: limit)
    assert prune_streamed(weights, Asked(gradients), 20, sparsity=0.5).passes == 3
    assert plan_pruning(weights, sparsity=0.5, gradients=20).passes == 3
    assert plan_pruning(weights, sparsity=0.5, scope="layer", held_besides=1).passes == 2
    assert plan_pruning(weights, sparsity=0.5, memory_limit=limit + 1).rounds == [[[0, 1]]]


def test_gradients_have_to_be_as_many_in_every_pass() -> None:
    weights, gradients = random_problem((32, 32), (32, 32))
    passes: list[list[int]] = []

    def fewer_and_fewer(indices: list[int]) -> Iterable[list[Tensor]]:
        passes.append(indices)
        return [[gradients[index][: 21 - len(passes)] for index in indices]]

    limit = estimate_memory([(32, 32)] * 2, block=32) - 1
    with pytest.raises(ValueError, match="20 gradients were announced, 19 came"):
        prune_streamed(weights, fewer_and_fewer, 20, sparsity=0.5, block=32, memory_limit=limit)


def test_memory_is_released_between_groups() -> None:
    import gc
    import weakref

    from ovit_engine.pruning import block_inverse

    alive: list[weakref.ref[Any]] = []

    class Counted(block_inverse.BlockInverse):
        def __init__(self, *args: Any) -> None:
            assert not [ref for ref in alive if ref() is not None], "the group before is still held"
            super().__init__(*args)
            alive.append(weakref.ref(self))

    weights, gradients = random_problem(*SHAPES, count=37)
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ovit_engine.pruning.ovit.BlockInverse", Counted)
            for scope in ("global", "layer"):
                limit = limit_of("ovit", PATTERNS[0])
                prune_streamed(weights, Asked(gradients), 37, sparsity=0.5, scope=scope, block=32, memory_limit=limit)
    finally:
        gc.enable()
    assert len(alive) > 3


@pytest.mark.parametrize("method", METHODS)
def test_progress_ends_with_everything_done(method: str) -> None:
    weights, gradients = random_problem(*SHAPES, count=37, dtype=torch.float32)
    numel = sum(weight.numel() for weight in weights)
    for limit in (None, limit_of(method, PATTERNS[0]) if method not in ("magnitude", "grad_weight") else None):
        told: dict[str, list[tuple[int, int]]] = {}
        pruned = prune_streamed(
            weights,
            Asked(gradients),
            37,
            method=method,
            sparsity=0.5,
            block=32,
            memory_limit=limit,
            progress=lambda stage, done, total, told=told: told.setdefault(stage, []).append((done, total)),  # type: ignore[misc]
        )
        stage = "eliminate" if method == "ovit" else "score"
        moves = ["move"] if method in ("ovit", "obert", "mfac") else []
        gradients_too = [] if method == "magnitude" else ["gradients"]
        assert sorted(told) == sorted([stage, *moves, *gradients_too])
        for name, reports in told.items():
            total = pruned.passes * 37 if name == "gradients" else numel
            assert {each for _, each in reports} == {total}
            assert [done for done, _ in reports] == sorted(done for done, _ in reports)
            assert reports[-1] == (total, total)
            assert (reports[0] == (0, total)) == (name == "gradients")
        assert set(pruned.timings) >= {stage, "allocate", *moves, *gradients_too}
        assert all(seconds >= 0 for seconds in pruned.timings.values())


@settings(deadline=None, derandomize=True, max_examples=100)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), room=st.integers(1, 120), bins=st.integers(1, 5))
def test_groups_hold_every_tensor_once_and_fit(sizes: list[int], room: int, bins: int) -> None:
    shared = balance(sizes, bins)
    assert sorted(chain.from_iterable(shared)) == list(range(len(sizes)))
    sums = [sum(sizes[i] for i in each) for each in shared]
    assert max(sums) - min(sums) <= max(sizes)
    names = [f"w{index}" for index in range(len(sizes))]
    if max(sizes) > room:
        with pytest.raises(MemoryError, match=rf"^w{sizes.index(max(sizes))}: .* for this tensor alone.*: less$"):
            into_groups(Memory(sizes, 7), room + 7, names, "cpu", "less")
        return
    groups = into_groups(Memory(sizes, 7), room + 7, names, "cpu", "less")
    assert sorted(chain.from_iterable(groups)) == list(range(len(sizes)))
    assert all(0 < sum(sizes[i] for i in each) <= room for each in groups)
    assert len(groups) <= 2 * -(-sum(sizes) // room)


def test_blocks_are_worked_on_in_the_same_chunks_whatever_else_is_held() -> None:
    weights = [torch.zeros(100, 192), torch.zeros(20, 192)]
    whole = make_problem(weights, None, None, Options(sparsity=0.5, block=192))
    chunks = list(Blocks(whole).chunks(1))
    assert list(Blocks(whole.part([1])).chunks(0)) == chunks
    assert 1 < len(chunks) < 20
