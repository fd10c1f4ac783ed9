"""What `import ovit_engine` does not load; import-linter checks the order of packages."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

LAZY = [
    "timm",
    "onnx",
    "onnxruntime",
    "neural_compressor",
    "transformers",
    "lightning",
    "accelerate",
    "tensorboard",
    "matplotlib",
]
HEAVY = [*LAZY, "onnxscript", "sklearn", "click", "rich", "torchvision"]


def test_modifiers_share_code_only_through_underscored_modules() -> None:
    for path in sorted((ROOT / "modifiers").glob("[!_]*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ovit_engine.modifiers"):
                assert (node.module or "").rsplit(".", 1)[-1].startswith("_"), f"{path} imports {node.module}"


def test_only_distributed_uses_torch_distributed() -> None:
    """import-linter does not know the submodules of other packages."""
    for path in (path for root in ("ovit_engine", "modifiers", "integrations") for path in (ROOT / root).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())) if path.parent.name != "distributed" else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            used = [*names, getattr(node, "module", None), ast.unparse(node) if isinstance(node, ast.Attribute) else ""]
            assert not any(str(name).startswith("torch.distributed") for name in used), f"{path}: {used}"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_core_loads_no_modifier_and_nothing_heavy() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); from ovit_engine import Engine; "
        "print(*(set(sys.modules) - before))"
    )
    loaded = run(code).split()
    assert "ovit_engine.engine" in loaded
    assert not [name for name in loaded if name.split(".")[0] in HEAVY]
    assert not [name for name in loaded if name.startswith(("ovit_engine.modifiers", "ovit_engine.integrations"))]
    assert not [name for name in loaded if name.startswith(("ovit_engine.cli", "ovit_engine.export"))]


def test_importing_the_package_loads_nothing_of_it() -> None:
    loaded = run("import sys; import ovit_engine; print(*sys.modules)").split()
    assert "torch" not in loaded
    assert [name for name in loaded if name.split(".")[0] == "ovit_engine"] == ["ovit_engine"]


def test_reading_a_recipe_loads_the_modifiers_and_still_nothing_heavy() -> None:
    code = (
        "import sys; from ovit_engine import Recipe; Recipe.parse('modifiers: [{cyclic_lr: {max: 1, min: 0.1}}]'); "
        "print(*sys.modules)"
    )
    loaded = run(code).split()
    assert "ovit_engine.modifiers.cyclic_lr" in loaded
    assert not [name for name in loaded if name.split(".")[0] in LAZY]
