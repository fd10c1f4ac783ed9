"""examples/plugin as an author uses it: copied, built as a wheel, installed, and run through every command."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

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


def test_its_pruner_runs_through_the_commands_of_its_readme(plugin: Path) -> None:
    commands = re.findall(r"^ovit (.+)$", (plugin / "README.md").read_text(), re.MULTILINE)
    said = {line.split()[0]: python(plugin, "-m", "ovit_engine", *line.split()).splitlines() for line in commands}
    assert list(said) == ["validate", "train", "sweep", "oneshot", "export", "verify"]

    assert said["validate"][-1] == "ria_sweep: ok on vit_tiny_patch16_224"
    assert [line.split()[:2] for line in said["sweep"][1:3]] == [["0.5", "50.00%"], ["0.75", "75.00%"]]

    with (plugin / "runs" / "ria_sweep-oneshot" / "oneshot.csv").open() as stream:
        compared = {(row["pruner"], row["asked"]): float(row["sparsity"]) for row in csv.DictReader(stream)}
    del compared["dense", ""]
    exact = {"0.8": round(0.8 * WEIGHTS) / WEIGHTS, "0.9": round(0.9 * WEIGHTS) / WEIGHTS}
    assert compared == {(pruner, asked): exact[asked] for pruner in ("ria", "magnitude") for asked in exact}

    layers = json.loads((plugin / "model.certificate.json").read_text())["layers"]
    pruned = [layer for layer in layers if layer["name"].startswith("blocks.")]
    assert sum(layer["numel"] for layer in pruned) == WEIGHTS
    assert sum(layer["zeros"] for layer in pruned) == zeros_in(plugin / "model.onnx") == 3 * WEIGHTS // 4
    assert said["verify"][-1] == "model.onnx is what its certificate says"


def zeros_in(file: Path) -> int:
    """Count the zeros of the block matrices without any code of ours."""
    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer]
    matrices = [array for array in arrays if array.ndim == 2 and array.size >= 32 * 32]
    assert sum(matrix.size for matrix in matrices) == WEIGHTS
    return sum(int(np.count_nonzero(matrix == 0)) for matrix in matrices)
