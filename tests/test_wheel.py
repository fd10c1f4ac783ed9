"""The wheel: only ovit_engine in site-packages, and it works there without the checkout."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SMOKE = """
from pathlib import Path
import torch
import ovit_engine
from ovit_engine import Engine, Recipe
assert Path(ovit_engine.__file__).is_relative_to(Path(SITE)), ovit_engine.__file__
recipe = Recipe.parse("modifiers: [{magnitude_prune: {sparsity: 0.5, targets: [weight], start: 1st}}]")
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
engine = Engine(model, recipe, steps_per_epoch=2, epochs=1)
engine.attach(optimizer)
for _ in range(2):
    optimizer.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
engine.detach()
assert int((model.weight == 0).sum()) == 8
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of a new environment with the wheel; the dependencies come from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", ROOT, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    site = folder / "venv" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    run(*pip, "--python", folder / "venv" / "bin" / "python", "install", "--no-deps", wheel, cwd=folder)
    return site


def test_only_ovit_engine_is_added(site: Path) -> None:
    added = {path.name for path in site.iterdir() if not path.name.startswith(("ovit_engine-", "__pycache__"))}
    assert added == {"ovit_engine"}
    assert (site / "ovit_engine" / "py.typed").is_file()
    pages = (
        "certificate/certificate.html",
        "report/report.html",
        "utils/base.html",
        "utils/parts.html",
        "utils/page.css",
    )
    assert all((site / "ovit_engine" / name).is_file() for name in pages)
    assert not (site / "ovit_engine" / "modifiers").is_symlink()
    assert (site / "ovit_engine" / "modifiers" / "ovit_prune.py").is_file()


def test_every_module_of_the_checkout_is_in_the_wheel(site: Path) -> None:
    def modules(root: Path) -> set[str]:
        return {str(path.relative_to(root)) for path in root.glob("**/*.py")}

    links = {f"{name}/{module}" for name in ("modifiers", "integrations", "recipes") for module in modules(ROOT / name)}
    assert modules(site / "ovit_engine") == modules(ROOT / "ovit_engine") | links


def test_it_works_away_from_the_checkout(site: Path, tmp_path: Path) -> None:
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = site.parents[2] / "bin" / "python"
    run(python, "-W", "error", "-c", f"SITE = {str(site)!r}\n{SMOKE}", cwd=tmp_path)
    listed = run(python.parent / "ovit", "recipes", cwd=tmp_path)
    shipped = [path.stem for path in (ROOT / "recipes").rglob("*.yaml")]
    assert shipped
    assert all(name in listed for name in shipped)
