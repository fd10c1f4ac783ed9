"""The direction of imports (design §2), and what `import ovit_engine` does not load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each layer may import from itself only where it is a package, and from any layer above it.
LAYERS = [
    ["recomputation"],
    [
        "event",
        "schedule",
        "pattern",
        "quant",
        "files",
        "progress",
        "random_states",
        "batched_gradients",
        "sharding",
        "distillation",
        "console",
        "manifest",
        "token_counts",
    ],
    ["second_order", "presets", "plots", "samples", "torch_files", "head_graph", "soft_pruning"],
    ["targets", "processes", "gate_choice", "topology"],
    ["masks", "gradient_pass", "gates", "attached"],
    [
        "calibration",
        "flops",
        "tokens",
        "loggers",
        "gate_scores",
        "teacher",
        "gate_budget",
        "gate_groups",
        "head_outputs",
    ],
    ["gate_ranking"],
    ["modifier"],
    ["registry"],
    ["reader"],
    ["recipe"],
    ["shrink_plan", "shrink_optimizer"],
    ["shrink_proof"],
    ["shrink", "export"],
    ["deploy"],
    ["agreement", "guards", "state", "sweep_folder", "watch", "loss_terms", "training_length"],
    ["hooks"],
    ["sweep"],
    ["engine"],
    ["points", "verify_resume"],
    ["report"],
]

CORE = [name for layer in LAYERS for name in layer]
LAZY = [
    "timm",
    "onnx",
    "onnxruntime",
    "neural_compressor",
    "torch_pruning",
    "transformers",
    "lightning",
    "accelerate",
    "tensorboard",
    "matplotlib",
]
HEAVY = [*LAZY, "onnxscript", "sklearn", "click", "rich", "torchvision"]


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def own_imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module below ovit_engine, whether only for types) for each import in a file, also inside functions."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            module = node.module or ""
            found = [f"{module}.{alias.name}" for alias in node.names] if module == "ovit_engine" else [module]
        else:
            continue
        for name in found:
            top, _, rest = name.partition(".")
            assert top not in ("modifiers", "integrations", "recipes"), f"{path}: the bare name loads the file twice"
            if top == "ovit_engine":
                yield rest.split(".")[0], id(node) in for_types


def core_files() -> list[tuple[str, Path]]:
    """Files of the core with the module or package they belong to (the links to top-level folders left out)."""
    found = []
    for path in sources("ovit_engine"):
        part = path.relative_to(ROOT / "ovit_engine").parts[0].removesuffix(".py")
        if part not in ("__init__", "__main__", "cli", "modifiers", "integrations", "recipes"):
            found.append((part, path))
    return found


@pytest.mark.parametrize(("part", "path"), core_files(), ids=lambda value: getattr(value, "name", value))
def test_the_core_imports_only_what_stands_before_it(part: str, path: Path) -> None:
    assert part in CORE, f"{path}: give it a place in LAYERS"
    level = next(i for i, layer in enumerate(LAYERS) if part in layer)
    before = {name for layer in LAYERS[:level] for name in layer}
    for module, for_types in own_imports(path):
        allowed = module == part or module in before or (module == "quant" and part == "export")
        assert allowed or for_types, f"{path} imports ovit_engine.{module}"


def test_modifiers_import_the_core_but_never_the_engine_nor_each_other() -> None:
    for path in sources("modifiers"):
        for module, _ in own_imports(path):
            assert module in {*CORE, "modifiers"} - {"engine", "deploy", "export"}, f"{path} imports {module}"
        if path.name == "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ovit_engine.modifiers"):
                assert (node.module or "").rsplit(".", 1)[-1].startswith("_"), f"{path} imports {node.module}"


def test_integrations_import_no_modifier_and_no_command() -> None:
    for path in sources("integrations"):
        for module, _ in own_imports(path):
            assert module in {*CORE, "integrations"} or module[:1].isupper(), f"{path} imports {module}"


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
