"""Tests marked `gpu` on the simulated accelerator, in a process of its own.

`pytest -m slow tests/slow/test_simulated_device.py` runs them all.
A single one of them, with its output: `pytest -p tests.simulated_device.plugin -m gpu tests/test_on_device.py -k NAME`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulated_device.backend import missing

FILES = [
    "tests/simulated_device/test_strictness.py",
    "tests/pruning/test_interface.py",
    "tests/test_on_device.py",
    "tests/test_loop_matrix.py",
]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_on_a_simulated_device(file: str) -> None:
    why = missing()
    if why is not None:
        pytest.skip(why)
    command = [sys.executable, "-m", "pytest", "-p", "tests.simulated_device.plugin", "-m", "gpu", "--tb=short", file]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
