"""The bundled trainer in two processes, as torchrun starts them."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ovit_engine import Recipe
from ovit_engine.distributed.comm import world
from ovit_engine.distributed.launch import Launch, launched
from ovit_engine.training.api import SILENT, Trained, train, with_training
from ovit_engine.training.checkpoint import load_checkpoint
from ovit_engine.training.device import choose_device
from ovit_engine.training.runs import restore
from ovit_engine.training.steps import Steps
from tests.processes import train_together
from tests.training.conftest import tiny_recipe

ROOT = Path(__file__).parents[2]
STOP = 7  # of 10 steps: within an epoch, quantized, between two pruning steps


def recipe() -> Recipe:
    """Pruned by oViT, whose gradients are shared, swept, quantized, averaged; no dropout, which differs by process."""
    modifiers = r"""
  - ovit_prune:
      {start: 5st, end: 8st, every: 3st, sparsity: {from: 0.3, to: 0.5}, targets: ['re:.*(qkv|fc1)\.weight'], block: 16,
       gradients: 8, images_per_gradient: 4, sweep: [0.3, 0.5]}
  - quantize: {start: 6st}
"""
    made = tiny_recipe(
        modifiers, epochs=2, extra="batch_size: 256, accumulate: 2, augmentation: noise, ema: 0.5, lr: 3.0e-3"
    )
    return with_training(made, model_args={**made.training.model_args, "drop_rate": 0.0, "weight_init": "jax"})


class StoppedError(Exception):
    pass


def _train(output: Path, *, stop: bool = False, resume: Path | None = None) -> Trained:
    step = Steps.__call__

    def until(steps: Steps, parts: Any, number: int) -> torch.Tensor:
        if stop and number == STOP:
            raise StoppedError
        return step(steps, parts, number)

    Steps.__call__ = until  # type: ignore[method-assign]
    try:
        return train(
            recipe(), data="digits", output=output, device="cpu", save_every=0.0, resume=resume, progress=SILENT
        )
    finally:
        Steps.__call__ = step  # type: ignore[method-assign]


def _digest(trained: Trained) -> str:
    digest = hashlib.sha256()
    for tensor in trained.model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    for packed in trained.engine.run.masks.state_dict().values():
        digest.update(packed["bits"].numpy().tobytes())
    return digest.hexdigest() + repr([replace(row, seconds=0.0) for row in trained.metrics])


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    digests = [_digest(_train(Path(folder) / "whole"))]
    try:
        _train(Path(folder) / "broken", stop=True)
    except StoppedError:
        dist.barrier()  # the first process has written its checkpoint
    digests.append(_digest(_train(Path(folder) / "broken", resume=Path(folder) / "broken")))
    found: list[Any] = [None, None]
    dist.all_gather_object(found, digests)
    assert found[0] == found[1]
    assert digests[0] == digests[1]
    with pytest.raises(RuntimeError, match=r"the rank now is not the same .* rank 1 differs from rank 0 \(1, not 0\)"):
        world().assert_equal(lambda: {"the rank": rank}, "now")
    dist.barrier()  # the store is a file that the first process to end removes
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, `whole` and one that was `broken` and resumed, equal bit for bit in both of them."""
    folder = tmp_path_factory.mktemp("runs")
    train_together(_process, str(folder))
    return folder


def test_two_processes_make_the_steps_of_one(runs: Path, tmp_path: Path) -> None:
    one = train(recipe(), data="digits", output=tmp_path, device="cpu", progress=SILENT)
    two = restore(runs / "whole")
    state = load_checkpoint(runs / "whole")
    assert state["engine"]["step"] == one.engine.run.step == 10  # batches of 256 are those of both together
    found = list(zip(state["metrics"], one.metrics, strict=True))
    for ours, theirs in found:
        assert ours["accuracy"] * 450 == pytest.approx(round(ours["accuracy"] * 450), abs=1e-9)  # of all images
        assert ours["accuracy"] == pytest.approx(theirs.accuracy, abs=0.02)
        assert ours["loss"] == pytest.approx(theirs.loss, rel=1e-3)
        assert ours["sparsity"] == theirs.sparsity
    assert found[0][0]["loss"] == pytest.approx(found[0][1].loss, rel=1e-6)  # the same images, augmented alike
    assert found[0][0]["accuracy"] == found[0][1].accuracy
    # sums in another order flip near ties
    masks = [(two.engine.run.masks.get(name), one.engine.run.masks.get(name)) for name in one.engine.run.masks.names()]
    agree = [float((ours == theirs).float().mean()) for ours, theirs in masks if ours is not None]
    assert min(agree) > 0.95
    theirs_by_name = dict(one.model.named_parameters())
    for name, parameter in two.model.named_parameters():
        if two.engine.run.masks.get(name) is None:
            torch.testing.assert_close(parameter, theirs_by_name[name], rtol=0.05, atol=5e-3)


def test_only_one_process_writes(runs: Path) -> None:
    for name in ("whole", "broken"):
        files = sorted(path.name for path in (runs / name).iterdir())
        assert files == ["last.pt", "metrics.csv", "previous.pt", "sweep"]
        assert len((runs / name / "metrics.csv").read_text().splitlines()) == 3


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Two processes of what `arguments` name."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_torchrun_starts_killed_processes_anew_and_they_go_on_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(recipe().dump())
    train = ["-m", "ovit_engine", "train", "--device", "cpu", "--recipe", "tiny.yaml", "--data", "digits"]
    options = ["--output", "run", "--resume", "auto", "--checkpoint-every", "0"]
    launcher = torchrun(tmp_path, "--max-restarts", "1", *train, *options)
    while launcher.poll() is None and not (tmp_path / "run" / "last.pt").exists():
        time.sleep(0.01)
    os.kill(children(launcher.pid)[-1], signal.SIGKILL)
    output, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    lines = [line.split()[:2] for line in output.splitlines()]  # one process speaks
    assert lines[0] == ["going", "on"]
    assert lines[-3:] == [["epoch", "2/2"], ["saved", "run/last.pt;"], ["the", "sweep"]]
    told = [line for line in errors.splitlines() if line.startswith("ovit: error")]
    assert set(told) <= {"ovit: error: another process of this training ended, or can't be reached"}
    found, whole = (load_checkpoint(each) for each in (tmp_path / "run", runs / "whole"))
    for key in ("model", "ema"):
        for name, tensor in found[key].items():
            assert torch.equal(tensor, whole[key][name]), name


def test_an_error_of_one_process_ends_all_with_one_message(tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    folder = image_folder()
    (folder / "val" / "cat" / "1.png").write_bytes(b"no image")  # the second image: only process 1 reads it
    model = {"img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 16, "depth": 1, "num_heads": 2}
    made = tiny_recipe(epochs=2, extra="batch_size: 4")
    (tmp_path / "tiny.yaml").write_text(with_training(made, model_args=model).dump())
    options = ["--recipe", "tiny.yaml", "--data", str(folder), "--output", "run", "--strict-images"]
    launcher = torchrun(tmp_path, "-m", "ovit_engine", "train", "--device", "cpu", *options)
    _, stderr = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    errors = [line for line in stderr.splitlines() if line.startswith("ovit: ")]
    broken = folder / "val" / "cat" / "1.png"
    assert errors == [f"ovit: error: '{broken}' is unreadable: no image format is known in it"]
    assert not (tmp_path / "run" / "last.pt").exists()


def test_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() == Launch()
    monkeypatch.setenv("RANK", "3")
    assert launched() == Launch()  # no count: not of torchrun
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched() == Launch(rank=3, count=4, local=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"1 GPUs for more processes: start 1 a machine \(--nproc-per-node 1\)"):
        choose_device("auto")
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("cuda") == torch.device("cuda", 1) == chosen[0]
    assert choose_device("cpu") == torch.device("cpu")
