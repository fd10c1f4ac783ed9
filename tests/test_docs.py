"""The code blocks of README and docs run as they stand: YAML is read as a recipe, Python is executed."""

import re
from pathlib import Path

import pytest

from ovit_engine import Recipe
from ovit_engine.core import registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)


@pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec.:Warning", "ignore:.*many workers:Warning"
)  # Lightning
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", registry.modifiers())  # what a page registers is gone after it
    blocks = list(BLOCK.finditer(page.read_text()))
    assert blocks, f"{page.name} has no code"
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        if block["file"]:
            Path(block["file"]).write_text(block["text"])
        if block["kind"] == "yaml":
            Recipe.parse(block["text"], file=page.name)
        elif block["kind"] == "python":
            exec(compile(block["text"], page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
