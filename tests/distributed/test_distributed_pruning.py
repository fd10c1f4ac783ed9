"""Two processes over gloo prune as one does: the same masks and weights, bit for bit, and nobody is left waiting."""

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ovit_engine import Calibration, Engine
from ovit_engine.distributed.comm import SINGLE_PROCESS, Comm, world
from ovit_engine.pruning import METHODS, plan_pruning, prune_streamed
from ovit_engine.pruning.problem import Options
from tests.loops import X, Y, mlp, recipe
from tests.processes import train_together

RANKS = 2
COUNT, CHUNK = 37, 8  # five chunks, so rank 1 has none in the last round, and that of rank 0 is short
SHAPES = [(16, 48), (16, 32), (8, 4, 3, 3), (24, 32), (5, 8)]
Case = dict[str, Any]


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for method in METHODS:
        for scope in ("global", "layer", "erk"):
            found[f"{method} {scope}"] = {"method": method, "scope": scope, "sparsity": 0.6}
        found[f"{method} 2:4"] = {"method": method, "pattern": "2:4"}
        found[f"{method} blocks"] = {"method": method, "pattern": {"block": [1, 4]}, "sparsity": 0.5}
    for method in ("ovit", "obert", "mfac"):
        limit = limit_of(method)
        found[f"{method} in groups"] = {"method": method, "sparsity": 0.6, "memory_limit": limit}
        found[f"{method} in groups, by layer"] = {
            "method": method,
            "scope": "layer",
            "sparsity": 0.6,
            "memory_limit": limit,
        }
    found["independent"] = {"method": "obert", "sparsity": 0.6, "update": "independent"}
    found["unmoved"] = {"method": "ovit", "sparsity": 0.6, "update": "none"}
    found["one tensor"] = {"sparsity": 0.6, "tensors": 1}
    found["pruned before"] = {"sparsity": 0.6, "before": True}
    found["bfloat16"] = {"sparsity": 0.6, "dtype_of_weights": torch.bfloat16}
    found["nothing to do"] = {"sparsity": 0.0}
    return found


def limit_of(method: str) -> int:
    """Bytes for the largest tensor, and for a chunk of gradients that is exchanged."""
    need = METHODS[method].memory([torch.Size(shape) for shape in SHAPES], Options(sparsity=0.5, block=32), COUNT)
    return need.besides + max(need.held) + 2 * 16 * 4 * sum(torch.Size(shape).numel() for shape in SHAPES)


def problem(tensors: int = len(SHAPES)) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES[:tensors]]
    return weights, [torch.randn(COUNT, *shape, generator=generator) for shape in SHAPES[:tensors]]


def source(gradients: list[Tensor], rank: int, ranks: int) -> Callable[[list[int]], Iterable[list[Tensor]]]:
    """Chunks of one rank, in a buffer that is used again."""

    def chunks(indices: list[int]) -> Iterator[list[Tensor]]:
        buffers = [torch.empty(CHUNK, *gradients[index].shape[1:]) for index in indices]
        for start in range(rank * CHUNK, COUNT, ranks * CHUNK):
            parts = [gradients[index][start : start + CHUNK] for index in indices]
            yield [buffer[: len(part)].copy_(part) for buffer, part in zip(buffers, parts, strict=True)]

    return chunks


def prune(case: Case, comm: Comm, **more: Any) -> dict[str, Any]:
    options = {"block": 32, "damp": 1e-4, "comm": comm, **case, **more}
    weights, gradients = problem(options.pop("tensors", len(SHAPES)))
    if options.pop("before", False):
        options["masks"] = [torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) > 0.2 for w in weights]
    weights = [weight.to(options.pop("dtype_of_weights", weight.dtype)) for weight in weights]
    pruned = prune_streamed(weights, source(gradients, comm.rank, comm.count), COUNT, **options)
    return {name: getattr(pruned, name) for name in ("masks", "weights", "errors", "passes")}


def failure(work: Callable[[], object]) -> str:
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def failures(rank: int, comm: Comm) -> dict[str, str]:
    weights, gradients = problem()
    mine = source(gradients, rank, RANKS)

    def run(chunks: Any = mine, weights: list[Tensor] = weights, **options: Any) -> str:
        options = {"sparsity": 0.6, "block": 32, "comm": comm, **options}
        return failure(lambda: prune_streamed(weights, chunks, COUNT, **options))

    def broken(indices: list[int]) -> Iterator[list[Tensor]]:
        for number, chunk in enumerate(mine(indices)):
            if rank == 1 and number == 1:
                chunk[2][3] = float("nan")
            yield chunk

    def interrupted(indices: list[int]) -> Iterator[list[Tensor]]:
        yield from mine(indices)
        if rank == 0:
            raise KeyboardInterrupt

    def short(indices: list[int]) -> Iterator[list[Tensor]]:
        return (chunk for number, chunk in enumerate(mine(indices)) if number < 2)

    other = [weight + (1e-6 if rank == 1 and index == 3 else 0.0) for index, weight in enumerate(weights)]
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    masks[0][0, 0] = rank == 0
    return {
        "memory": run(memory_limit=1 if rank == 1 else None),
        "non-finite": run(broken),
        "interrupt": run(interrupted),
        "short": run(short),
        "weights": run(weights=other),
        "masks": run(masks=masks),
        "sparsity": run(sparsity=0.6 + 0.1 * rank),
        "method": run(method="obert" if rank else "ovit"),
        "a weight": run(weights=[w * (float("nan") if rank == 0 else 1) for w in weights]),
        "plan": failure(lambda: plan_pruning(weights, sparsity=0.6, memory_limit=1 if rank == 0 else None, comm=comm)),
    }


class Shared(Calibration):
    """Notes which share is asked for."""

    shares: list[tuple[int, int]]

    def gradients(self, *args: Any, share: tuple[int, int] = (0, 1), **options: Any) -> Iterator[list[Tensor]]:
        self.shares = [*getattr(self, "shares", []), share]
        return super().gradients(*args, share=share, **options)


class Shift(nn.Module):
    """Does nothing with a buffer, which DistributedDataParallel sends around before every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("by", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def train(text: str, *, is_calibrated: bool = True, is_parallel: bool = True, steps: int = 6) -> dict[str, Any]:
    """Masks and weights after a training in which every rank sees its part of each batch."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if is_parallel else (0, 1)
    model = mlp().append(Shift())
    # wrapped before the engine sees it: calibration must not run its forward, in which ranks wait for each other
    trained: nn.Module = nn.parallel.DistributedDataParallel(model) if is_parallel else model
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    text = text.replace("TARGETS", "targets: ['re:.*weight']")
    engine = Engine(trained, recipe(text), steps_per_epoch=steps, epochs=1)
    data = torch.utils.data.TensorDataset(X, Y)
    calibration = Shared(data, nn.functional.mse_loss) if is_calibrated else None
    first: dict[str, Tensor] = {}
    with engine.attach(optimizer, calibration=calibration):
        first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(trained(X[rank::ranks]), Y[rank::ranks]).backward()
            optimizer.step()
    masks = {name: engine.run.masks.get(name) for name in engine.run.masks.names()}
    shares = getattr(calibration, "shares", [])
    return {"first": first, "last": dict(model.state_dict()), "masks": masks, "shares": shares}


RECIPES = {
    "ovit": "ovit_prune: {TARGETS, sparsity: {0st: 0.3, 3st: 0.6}, block: 16, damp: 1.0e-4, gradients: 70}",
    "mfac in parts": "mfac_prune: {TARGETS, sparsity: {0st: 0.3, 3st: 0.6}, gradients: 40, recomputations: 2}",
    "2:4": "obert_prune: {TARGETS, start: 0st, pattern: '2:4', block: 16, gradients: 40}",
    "magnitude": "magnitude_prune: {TARGETS, sparsity: {0st: 0.3, 3st: 0.6}}",
}
OF_TRAINING = "ovit_prune: {TARGETS, sparsity: 0.6, start: 5st, block: 4, damp: 1.0e-4, gradients: 16}"


def work(rank: int, folder: str, port: int) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120))
    found: dict[str, Any] = {
        "failures": failures(rank, world())
    }  # first: what follows shows that all is well after them
    found["cases"] = {name: prune(case, world()) for name, case in cases().items()}
    found["trained"] = {name: train(text) for name, text in RECIPES.items()}
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no calibration was given")
        found["of training"] = train(OF_TRAINING, is_calibrated=False)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    train_together(work, str(folder), port, ranks=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("name", cases())
def test_two_ranks_prune_as_one_process_does(name: str, found: list[dict[str, Any]]) -> None:
    first, second = (each["cases"][name] for each in found)
    assert_same(first, second)
    case = {key: value for key, value in cases()[name].items() if key != "memory_limit"}
    alone = prune(case, SINGLE_PROCESS)
    passes, passes_alone = first.pop("passes"), alone.pop("passes")
    assert_same(first, alone)
    assert passes == (3 if name.endswith("in groups") else 2 if "in groups" in name else passes_alone)


@pytest.mark.parametrize(
    ("what", "raised"),
    [
        ("memory", ["RuntimeError: rank 1 failed: MemoryError: weights[", "MemoryError: weights["]),
        (
            "non-finite",
            [
                "RuntimeError: rank 1 failed: ValueError: weights[2]: non-finite values in gradient 27",
                "ValueError: weights[2]: non-finite values in gradient 27",
            ],
        ),
        ("interrupt", ["KeyboardInterrupt", "RuntimeError: rank 0 failed: KeyboardInterrupt"]),
        ("short", ["ValueError: 37 gradients were announced, 32 came"] * 2),
        (
            "weights",
            ["RuntimeError: the weight weights[3] before pruning is not the same in all"] * 2,
        ),
        ("masks", ["RuntimeError: the mask of weights[0] before pruning is not the same in all"] * 2),
        ("sparsity", ["RuntimeError: option sparsity before pruning is not the same in all"] * 2),
        ("method", ["RuntimeError: method before pruning is not the same in all"] * 2),
        ("a weight", ["ValueError: weights[0]: non-finite weight", "RuntimeError: rank 0 failed: ValueError"]),
        ("plan", ["MemoryError: weights[", "RuntimeError: rank 0 failed: MemoryError"]),
    ],
)
def test_what_fails_on_one_rank_raises_on_both(what: str, raised: list[str], found: list[dict[str, Any]]) -> None:
    for each, text in zip(found, raised, strict=True):
        assert each["failures"][what].startswith(text)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_under_ddp(name: str, found: list[dict[str, Any]]) -> None:
    first, second = (each["trained"][name] for each in found)
    shares = first.pop("shares"), second.pop("shares")
    assert_same(first, second)
    assert set(shares[0] + shares[1]) == (set() if name == "magnitude" else {(0, 2), (1, 2)})
    assert len(shares[0]) == {"ovit": 2, "mfac in parts": 4, "2:4": 1, "magnitude": 0}[name]
    alone = train(RECIPES[name], is_parallel=False)
    assert_same(first["first"], alone["first"])  # pruned at step 0, from equal weights


def test_gradients_of_training_under_ddp(found: list[dict[str, Any]]) -> None:
    first, second = (each["of training"] for each in found)
    assert_same(first, second)
    with pytest.warns(UserWarning, match="no calibration was given"):
        alone = train(OF_TRAINING, is_calibrated=False, is_parallel=False)
    assert_same(first["masks"], alone["masks"])
    for name, tensor in alone["last"].items():
        torch.testing.assert_close(first["last"][name], tensor, rtol=1e-4, atol=1e-5)
