"""Benchmarks are not run by tests, but they must import what they use: a moved name breaks them silently."""

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_it_imports(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("sys.argv", [script])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # scripts set them where nobody did; monkeypatch puts them back
        monkeypatch.setenv(name, "1")
    runpy.run_path(str(BENCHMARKS / script), run_name="benchmark")
