"""scripts/gpu with a Python that notes what it is asked: which tests are run on a GPU, and how."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$ASKED"
case "$*" in
-) echo "Abacus, torch 2" ;;
"-c import xdist") exit "$NO_XDIST" ;;
"-m pytest "*) echo "9 passed"; exit "$FAILED" ;;
esac
"""


def asked(folder: Path, *, xdist: bool, failed: int = 0) -> tuple[int, list[str]]:
    """The exit code and the arguments of pytest."""
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    told = {
        "PYTHON": str(python),
        "ASKED": str(folder / "asked"),
        "NO_XDIST": str(int(not xdist)),
        "FAILED": str(failed),
    }
    command = [ROOT / "scripts" / "gpu", folder / "out"]
    done = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert (folder / "out" / "tests.txt").read_text() == "9 passed\n"
    lines = (folder / "asked").read_text().splitlines()
    assert any(line.startswith("-m ovit_engine bench --device cuda recipes/paper/table2_deit_tiny") for line in lines)
    return done.returncode, lines[-1].split()


@pytest.mark.parametrize("xdist", [False, True])
def test_all_files_with_tests_of_a_gpu_are_run_on_several_cores_where_xdist_is(xdist: bool, tmp_path: Path) -> None:
    code, arguments = asked(tmp_path, xdist=xdist)
    assert code == 0
    assert arguments[:4] == ["-m", "pytest", "-m", "gpu"]
    assert ("-n" in arguments) == xdist
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"\bpytest\.mark\.gpu\b|\bimport .*\b(DEVICES|ACCELERATOR)\b", path.read_text())
    }
    assert {"tests/test_loop_matrix.py", "tests/test_on_device.py", "tests/distributed/test_scale_out.py"} <= wanted
    assert wanted <= {each for each in arguments if each.startswith("tests/")}


def test_a_test_that_fails_is_the_exit_code(tmp_path: Path) -> None:
    assert asked(tmp_path, xdist=True, failed=1)[0] == 1
