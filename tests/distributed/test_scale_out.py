"""Two processes over gloo train one model: the same on both ranks, and what one process makes of both batches."""

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Shard, distribute_tensor

from ovit_engine import Calibration, Engine, whole_model
from ovit_engine.distributed.comm import GroupComm
from ovit_engine.masking.targets import find_slots
from tests.distributed.scale_out import (
    AT_ATTACH,
    CASES,
    DRAWN,
    RECIPES,
    STEPS,
    digits_accuracy,
    loss_fn,
    model_for,
    resumed,
    spread,
    start,
    taught,
    train,
)
from tests.distributed.test_distributed_pruning import assert_same, failure
from tests.loops import X, Y, mlp, recipe
from tests.processes import train_together

RANKS = 2
SPREAD = ["ddp", "fsdp2"]


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def on_rank_1(rank: int, number: int, do: Callable[[Any], object]) -> Callable[[Engine, int], None]:
    """Does something to the model of rank 1 alone, before step `number` (counted from 0)."""

    def before(engine: Engine, step: int) -> None:
        if rank == 1 and step == number:
            with torch.no_grad():
                do(engine)

    return before


def lose_a_row(engine: Any) -> None:
    engine.run.masks.get("0.weight")[3] = False


def hurry(engine: Any) -> None:
    engine.run.step += 2


def engine_of(model: nn.Module, steps: int = STEPS) -> Engine:
    return Engine(model, recipe(*RECIPES["magnitude"]), steps_per_epoch=steps, epochs=1)


def failures(rank: int) -> dict[str, str]:
    """What each process says where one of them is not as the other."""
    model = mlp()
    sharded = engine_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    spread("fsdp2", model, "cpu")
    calibration = Calibration(torch.utils.data.TensorDataset(X, Y), loss_fn)
    split = nn.Linear(4, 4)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    split.weight = nn.Parameter(distribute_tensor(split.weight.detach(), mesh, [Shard(0)]))
    uneven = engine_of(mlp(), STEPS + rank)
    seeds = Engine(
        mlp(),
        recipe(f"svite: {{every: 2st, sparsity: 0.5, seed: {rank}, targets: [0.weight]}}"),
        steps_per_epoch=STEPS,
        epochs=1,
    )
    flat = {views: mlp() for views in (True, False)}
    unaware = {views: engine_of(flat[views]) for views in flat}
    wrapped = [FullyShardedDataParallel(flat[v], use_orig_params=v, device_id=torch.device("cpu")) for v in flat]
    impatient = dist.new_group(timeout=timedelta(seconds=1))
    kinds: dict[str, Callable[[], object]] = {
        "fsdp1": lambda: engine_of(wrapped[0]),
        "fsdp1, made later": lambda: unaware[True].attach(torch.optim.SGD(wrapped[0].parameters(), 0.1)),
        "fsdp1, one buffer": lambda: unaware[False].attach(torch.optim.SGD(wrapped[1].parameters(), 0.1)),
        "mask": lambda: train("ddp", "magnitude", before=on_rank_1(rank, 2, lose_a_row)),
        "mask of a shard": lambda: train("fsdp2", "magnitude", before=on_rank_1(rank, 2, lose_a_row)),
        "range": lambda: train("ddp", "int8", before=on_rank_1(rank, 5, lambda e: e.model[2].weight.mul_(2))),
        "error": lambda: train("ddp", "magnitude", before=on_rank_1(rank, 2, lambda e: setattr(e.run, "log", None))),
        "clock of a step": lambda: train("ddp", "acdc", before=on_rank_1(rank, 2, hurry)),
        "late": lambda: GroupComm(impatient).assert_equal(dict, "after step 3") if rank == 0 else None,
        "clock": lambda: uneven.attach(torch.optim.SGD(uneven.model.parameters(), 0.1)),
        "seed": lambda: seeds.attach(torch.optim.SGD(seeds.model.parameters(), 0.1)),
        "optimizer": lambda: sharded.attach(optimizer),
        "gradients": lambda: calibration.gradients(
            model, find_slots(model, ["0.weight"]), count=1, images_per_gradient=1, chunk=1
        ),
        "split": lambda: whole_model(split).__enter__(),
        "teacher": lambda: taught("ddp", differs=True),
    }
    return {name: failure(work) for name, work in kinds.items()}


def export(rank: int, folder: str) -> dict[str, Any]:
    """What a sharded model gives away, and how it is afterwards."""
    model = mlp()
    engine = Engine(model, recipe(*RECIPES["int8"]), steps_per_epoch=STEPS, epochs=1).prepare()
    spread("fsdp2", model, "cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with engine.attach(optimizer):
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_fn(model(X), Y).backward()
            optimizer.step()
    model.eval()
    refused = failure(lambda: engine.export(f"{folder}/{rank}.onnx", X[:2]))
    with torch.no_grad():
        before = model(X)
        classes = [type(module) for module in model.modules()]
        with whole_model(model):
            copied = copy.deepcopy(model)
            if rank == 0:
                engine.export(f"{folder}/model.onnx", X[:2])
        after = model(X)
        assert classes == [type(module) for module in model.modules()]
    return {
        "refused": refused,
        "before": before,
        "after": after,
        "copied": copied(X).detach(),
        "type": str(type(copied)),
    }


def work(rank: int, folder: str) -> None:
    """What each process does."""
    start(rank, RANKS, f"{folder}/store", "cpu")
    found: dict[str, Any] = {"failures": failures(rank)}  # first: what follows shows that all is well after them
    found["trained"] = {f"{kind}: {name}": train(kind, name) for kind, name in CASES}
    found["taught"] = {kind: taught(kind) for kind in SPREAD}
    found["unbroken"] = resumed(None)
    found["resumed"] = {cut: resumed(cut) for cut in (2, 5)}
    images, labels = torch.load(f"{folder}/digits.pt")
    found["digits"] = {kind: digits_accuracy(kind, images, labels) for kind in SPREAD}
    found["export"] = export(rank, folder)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks leave what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(digits(), folder / "digits.pt")
    train_together(work, str(folder), ranks=RANKS)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: train("alone", name) for name in RECIPES}


def assert_close(tensors: dict[str, Tensor], others: dict[str, Tensor], tolerance: float) -> None:
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        # an integer may be one apart where a range is just so
        atol = 1.0 if name.endswith("zero_point") else tolerance
        assert float((tensor.float() - others[name].float()).abs().max()) <= atol, name


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_two_ranks_train_as_one_process_does(
    kind: str, name: str, found: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    first, second = (each["trained"][f"{kind}: {name}"] for each in found)
    assert_same(first, second)
    one = alone[name]
    assert first["passes"] == one["passes"] + kind.endswith("fp16")  # a step is skipped by both ranks
    if name in AT_ATTACH:
        assert_same(first["first"], one["first"])
    assert all(bool(tensor.isfinite().all()) for tensor in first["last"].values())
    if kind.endswith("fp16") or name in DRAWN:
        return  # other numbers
    assert_same(first["engine"]["masks"], one["engine"]["masks"])
    last, alike = first["last"], one["last"]
    if kind.endswith("no_sync"):  # observers follow two halves of a batch
        last, alike = ({key: each[key] for key in each if "quantizer" not in key} for each in (last, alike))
    assert_close(last, alike, 1e-2 if name in ("int8", "stacked") else 1e-5)


def test_what_ranks_trained_with_fewer_tokens_is_exported(found: list[dict[str, Any]], tmp_path: Path) -> None:
    trained = found[0]["trained"]["fsdp2: predicted"]
    model = model_for("predicted", "cpu")
    engine = Engine(model, recipe(*RECIPES["predicted"]), steps_per_epoch=STEPS, epochs=1)
    engine.load_state_dict(trained["engine"])
    model.load_state_dict(trained["last"])
    certificate = engine.export(tmp_path / "m.onnx", X[:1], data=[(X, torch.zeros(len(X), dtype=torch.int64))])
    assert certificate.ops["TopK"] == 2
    assert certificate.parity is not None
    assert certificate.parity.max_error < 1e-2  # scores of new predictors are close: another token may win


@pytest.mark.parametrize("kind", SPREAD)
def test_what_ranks_left_dead_is_removed(kind: str, found: list[dict[str, Any]], tmp_path: Path) -> None:
    trained = found[1]["trained"][f"{kind}: dead"]
    model = model_for("dead", "cpu")
    engine = Engine(model, recipe(*RECIPES["dead"]), steps_per_epoch=STEPS, epochs=1)
    engine.load_state_dict(trained["engine"])
    model.load_state_dict(trained["last"])
    certificate = engine.export(tmp_path / "m.onnx", X[:1], data=[(X, torch.zeros(len(X), dtype=torch.int64))])
    sizes = {layer.name: layer.shape for layer in certificate.layers}
    assert sizes["0.blocks.0.mlp.fc1.weight"][0] == sizes["0.blocks.0.mlp.fc2.weight"][1] < 64


@pytest.mark.parametrize("kind", SPREAD)
def test_each_rank_asks_the_teacher_about_its_own_images(kind: str, found: list[dict[str, Any]]) -> None:
    first, second = (each["taught"][kind] for each in found)
    assert_same(first, second)
    assert_close(first, taught("alone"), 1e-6)


def test_units_go_in_the_groups_of_a_pattern(found: list[dict[str, Any]]) -> None:
    for kind in SPREAD:
        last = found[0]["trained"][f"{kind}: in groups"]["last"]
        gate = last["0.mlp.fc2.input_gate"].view(3, 4)
        assert sorted(gate.sum(1).tolist()) == [0, 4, 4]
        kept = (last["0.mlp.fc2.weight"].view(16, 3, 4) != 0).sum(2)
        assert bool((kept[:, gate.all(1)] == 2).all())


def test_ranges_are_those_of_the_whole_batch(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for kind in ("ddp", "ddp, own buffers", "fsdp2"):
        tensors, one = found[0]["trained"][f"{kind}: int8"]["last"], alone["int8"]["last"]
        for key in ("0.input_quantizer.minimum", "0.input_quantizer.maximum"):  # of the inputs: no weight comes before
            torch.testing.assert_close(tensors[key], one[key], rtol=1e-6, atol=0)
    assert float(X[::2].min()) != float(X[1::2].min())  # the ranks see different ones


@pytest.mark.parametrize(
    ("what", "raised"),
    [
        (
            "fsdp1",
            ["TypeError: the model is in FSDP1 (FullyShardedDataParallel), where no weight can be masked: use"] * 2,
        ),
        (
            "fsdp1, made later",
            ["TypeError: the model is in FSDP1 (FullyShardedDataParallel), where no weight can be masked: use"] * 2,
        ),
        (
            "fsdp1, one buffer",
            ["TypeError: the model is in FSDP1 (FullyShardedDataParallel), where no weight can be masked: use"] * 2,
        ),
        (
            "mask",
            ["RuntimeError: the mask of '0.weight' after step 3 is not the same in all processes: rank 1 differs"] * 2,
        ),
        ("mask of a shard", ["RuntimeError: the mask of '0.weight' after step 3 is not the same in all processes"] * 2),
        (
            "range",
            ["RuntimeError: the range of '2.weight_quantizer' after step 6 is not the same in all processes"] * 2,
        ),
        (
            "error",
            ["RuntimeError: rank 1 failed: TypeError: 'NoneType' object is not", "TypeError: 'NoneType' object is"],
        ),
        (
            "clock",
            [
                "RuntimeError: steps_per_epoch at attach is not the same in all processes: rank 1 differs from rank 0 "
                "(9, not 8)"
            ]
            * 2,
        ),
        ("seed", ["RuntimeError: the recipe at attach is not the same in all processes: rank 1 differs from"] * 2),
        (
            "clock of a step",
            [
                "RuntimeError: the number of applied steps after step 3 is not the same in all processes: rank 1 "
                "differs from rank 0 (5, not 3)",
                "RuntimeError: the number of applied steps after step 5 is not the same in all processes: rank 1 "
                "differs from rank 0 (5, not 3)",
            ],
        ),
        (
            "late",
            [
                "ProcessLostError: the processes lost each other after step 3: one ended, or waits at another step",
                "nothing was raised",
            ],
        ),
        (
            "optimizer",
            ["ValueError: the optimizer holds no parameter of this model: it was made before fully_shard"] * 2,
        ),
        ("gradients", ["ValueError: '0.weight' is sharded: take gradients in `with whole_model(model):`"] * 2),
        ("teacher", ["RuntimeError: the teacher at attach is not the same in all processes: rank 1 differs"] * 2),
        ("split", ["TypeError: 'weight' is sharded over DeviceMesh"] * 2),
    ],
)
def test_a_rank_that_is_not_as_the_others_stops_all(what: str, raised: list[str], found: list[dict[str, Any]]) -> None:
    for each, text in zip(found, raised, strict=True):
        assert each["failures"][what].startswith(text), each["failures"][what]
        assert "\n" not in each["failures"][what]


@pytest.mark.parametrize("cut", [2, 5])
def test_a_sharded_run_goes_on_bit_for_bit(cut: int, found: list[dict[str, Any]]) -> None:
    assert_same(found[0]["resumed"][cut], found[0]["unbroken"])
    assert_same(found[1]["resumed"][cut], found[0]["unbroken"])


def test_the_state_of_a_sharded_run_is_whole(found: list[dict[str, Any]]) -> None:
    model = mlp()
    engine = Engine(model, recipe(*RECIPES["stacked"]), steps_per_epoch=STEPS, epochs=1).prepare()
    weights, state = found[1]["unbroken"]
    engine.load_state_dict(state)
    assert torch.equal(weights["0.weight"] != 0, engine.run.masks.get("0.weight"))
    model.load_state_dict(weights)


@pytest.mark.parametrize("kind", SPREAD)
def test_whole_runs_agree_in_accuracy(kind: str, found: list[dict[str, Any]]) -> None:
    one = digits_accuracy("alone", *digits())
    assert one > 0.85
    assert found[0]["digits"][kind] == found[1]["digits"][kind]
    assert abs(found[0]["digits"][kind] - one) < 0.02


def test_a_sharded_model_is_whole_for_a_while(found: list[dict[str, Any]], folder: Path) -> None:
    for each in (rank["export"] for rank in found):
        assert each["refused"].startswith("RuntimeError: the model is sharded: enter `with whole_model(engine.model):`")
        assert torch.equal(each["before"], each["after"])
        torch.testing.assert_close(each["before"], each["copied"], rtol=1e-6, atol=1e-6)
        assert "Sequential" in each["type"]
        assert "FSDP" not in each["type"]
    assert (folder / "model.certificate.json").exists()
    assert not list(folder.glob("[01].onnx"))


def work_on_gpu(rank: int, ranks: int, folder: str) -> None:
    """As `work`, over NCCL."""
    start(rank, ranks, f"{folder}/store", "cuda")
    found = {f"{kind}: {name}": train(kind, name, "cuda") for kind, name in CASES if kind != "zero"}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.gpu
def test_on_gpus(tmp_path: Path) -> None:
    """On as many as there are, two at most; compiled by inductor, float16 with a scaler."""
    ranks = min(RANKS, torch.cuda.device_count())
    torch.multiprocessing.spawn(work_on_gpu, (ranks, str(tmp_path)), nprocs=ranks)  # type: ignore[no-untyped-call]
    each = [torch.load(tmp_path / f"{rank}.pt", map_location="cpu") for rank in range(ranks)]
    assert_same(each[0], each[-1])
    for case, found in each[0].items():
        one = train("alone", case.split(": ", 1)[1], "cuda")
        assert found["passes"] == one["passes"] + ("fp16" in case), case
        for name, tensor in one["last"].items():
            assert bool(found["last"][name].isfinite().all()), (case, name)
            assert int((found["last"][name] == 0).sum()) == int((tensor == 0).sum()) or "quantizer" in name, (
                case,
                name,
            )
