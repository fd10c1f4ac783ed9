"""examples/plugin as an author uses it: copied, built as a wheel, installed, and run through every command."""

import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

ROOT = Path(__file__).parent.parent

WEIGHTS = 24_576  # attention and MLP matrices of two blocks 32 wide: 2 * 12 * 32 ** 2
BEYOND_PATH = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=BEYOND_PATH, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the template beside a new environment with its wheel, with what this one imports and the checkout."""
    folder = tmp_path_factory.mktemp("plugin")
    copied = shutil.copytree(ROOT / "examples" / "plugin", folder / "plugin")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", copied, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    run(*pip, "--python", folder / "venv" / "bin" / "python", "install", "--no-deps", wheel, cwd=folder)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "venv" / "lib" / version / "site-packages"
    (site / "dependencies.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    assert (site / "ovit_plugin_example" / "pruners.py").is_file()
    return copied


def python(plugin: Path, *arguments: str | Path) -> str:
    return run(plugin.parent / "venv" / "bin" / "python", "-W", "error::UserWarning", *arguments, cwd=plugin)


def test_the_authors_own_tests_pass(plugin: Path) -> None:
    assert "9 passed" in python(plugin, "-m", "pytest", "-p", "no:cacheprovider", "tests")


def test_its_pruner_runs_through_every_command(plugin: Path) -> None:
    def ovit(command: str) -> list[str]:
        return python(plugin, "-m", "ovit_engine", *command.split()).splitlines()

    assert ovit("validate recipe.yaml")[-1] == "ria_sweep: ok on vit_tiny_patch16_224"
    ovit("train --recipe recipe.yaml --data digits --output run --seed 0 --device cpu")

    rows = [line.split()[:2] for line in ovit("sweep run")]
    assert rows[:3] == [["point", "sparsity"], ["0.5", "50.00%"], ["0.75", "75.00%"]]

    ovit(
        "oneshot --recipe recipe.yaml --data digits --checkpoint run/sweep/0.5.pt --sparsity 0.75 "
        "--compare ria,ria_rescale,magnitude --output compared --device cpu"
    )
    with (plugin / "compared" / "oneshot.csv").open() as stream:
        compared = {row["pruner"]: float(row["sparsity"]) for row in csv.DictReader(stream) if row["asked"]}
    assert compared == {"ria": 0.75, "ria_rescale": 0.75, "magnitude": 0.75}

    ovit("export run --output model.onnx")
    certificate: dict[str, Any] = json.loads((plugin / "model.certificate.json").read_text())
    pruned = {layer["name"]: layer["zeros"] for layer in certificate["layers"] if ".blocks." in f".{layer['name']}"}
    assert len(pruned) == 8
    assert sum(pruned.values()) == 3 * WEIGHTS // 4
    assert zeros_in(plugin / "model.onnx") == 3 * WEIGHTS // 4
    assert ovit("verify model.onnx")[-1] == "model.onnx is what its certificate says"


def zeros_in(file: Path) -> int:
    """Count the zeros of the block matrices without any code of ours."""
    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer]
    matrices = [array for array in arrays if array.ndim == 2 and array.size >= 32 * 32]
    assert sum(matrix.size for matrix in matrices) == WEIGHTS
    return sum(int(np.count_nonzero(matrix == 0)) for matrix in matrices)
