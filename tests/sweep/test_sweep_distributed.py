"""A sweep where two processes train: one writes, and sharded weights are gathered."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from ovit_engine import Engine
from ovit_engine.sweep.folder import FOLDER, read_index
from tests.loops import PRUNE, mlp, plain, recipe
from tests.processes import train_together

SWEEP = f"{PRUNE[:-1]}, sweep: [0.25, 0.5]}}"


def _train(output: Path, model: nn.Module, loop: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    engine = Engine(model, recipe(SWEEP), steps_per_epoch=10, epochs=4, output=output).attach(optimizer)
    for step in range(40):
        plain(loop, optimizer)
        engine.metric("accuracy", {12: 0.5, 35: 0.9}.get(step, 0.1))
    engine.detach()


def _process(rank: int, output: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{output}/store", rank=rank, world_size=2)
    model = mlp()
    _train(Path(output) / "ddp", model, nn.parallel.DistributedDataParallel(model))
    model = mlp()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    _train(Path(output) / "fsdp", model, model)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of one process, and two of two."""
    folder = tmp_path_factory.mktemp("runs")
    train_together(_process, str(folder))
    model = mlp()
    _train(folder / "one", model, model)
    return folder


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_two_processes_leave_the_points_of_one(runs: Path, kind: str) -> None:
    index, one = read_index(runs / kind / FOLDER), read_index(runs / "one" / FOLDER)
    assert [(p.sparsity, p.measured, p.step, p.metric) for p in index.points] == [
        (p.sparsity, p.measured, p.step, p.metric) for p in one.points
    ]
    assert [p.parameters_left for p in index.points] == [161 - 32, 161 - 64]
    for name in ("0.25.pt", "0.5.pt"):
        ours, theirs = (torch.load(runs / each / FOLDER / name, weights_only=True)["model"] for each in (kind, "one"))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-6)
            assert torch.equal(tensor == 0, theirs[key] == 0)
