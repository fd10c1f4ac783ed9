"""The README's line for several machines, with two agents of torchrun on this one; the death of a process on either."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ovit_engine.training.checkpoint import load_checkpoint
from tests.training.test_processes import ROOT, children, recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc"),
]
OPTIONS = ["--recipe", "tiny.yaml", "--data", "digits", "--output", "run", "--resume", "auto"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
    return port


def start(folder: Path, node: int, port: int) -> subprocess.Popen[bytes]:
    """One machine's line; its words go to files, since nobody reads while it runs."""
    line = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint localhost:{port} --rdzv-id x"
    command = [sys.executable, "-m", "torch.distributed.run", *line.split(), "--max-restarts", "3"]
    with (folder / f"{node}.out").open("wb") as out, (folder / f"{node}.err").open("wb") as err:
        return subprocess.Popen(
            [*command, "-m", "ovit_engine", "train", *OPTIONS, "--device", "cpu", "--checkpoint-every", "0"],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=out,
            stderr=err,
        )


def run(folder: Path, killed: int | None) -> dict[str, Any]:
    """The checkpoint that two machines left; on one of them the process was killed after the first step was saved."""
    (folder / "tiny.yaml").write_text(recipe().dump())
    port = free_port()
    nodes = [start(folder, number, port) for number in range(2)]
    try:
        if killed is not None:
            while nodes[killed].poll() is None and not (folder / "run" / "last.pt").exists():
                time.sleep(0.01)
            (worker,) = children(nodes[killed].pid)
            os.kill(worker, signal.SIGKILL)
        assert [node.wait(timeout=120) for node in nodes] == [0, 0], (folder / "0.err").read_text()
    finally:
        for node in nodes:
            node.terminate()
            node.wait(timeout=60)
    return load_checkpoint(folder / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, None)


def test_one_process_writes_and_the_run_is_exported(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, state = whole
    assert state["engine"]["step"] == 10
    assert sorted(path.name for path in (folder / "run").iterdir()) == [
        "last.pt",
        "metrics.csv",
        "previous.pt",
        "sweep",
    ]
    spoken = [(folder / f"{node}.out").read_text() for node in range(2)]
    assert sorted(bool(text) for text in spoken) == [False, True]
    export = [sys.executable, "-m", "ovit_engine", "export", "run", "--output", "model.onnx"]
    subprocess.run(export, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert (folder / "model.certificate.json").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_brings_all_back_to_the_last_checkpoint(
    killed: int, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Their agents count restarts each for itself: the two processes must find each other all the same."""
    found = run(tmp_path, killed)
    spoken = "".join((tmp_path / f"{node}.out").read_text() for node in range(2))
    assert "going on from run/last.pt" in spoken
    told = "".join((tmp_path / f"{node}.err").read_text() for node in range(2)).splitlines()
    assert {line for line in told if line.startswith("ovit:")} <= {
        "ovit: error: another process of this training ended, or can't be reached"
    }
    for key in ("model", "ema"):
        for name, tensor in found[key].items():
            assert torch.equal(tensor, whole[1][key][name]), name
