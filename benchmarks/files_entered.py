"""Count the files and packages that prepare, one training step, export and verify enter.

    python benchmarks/files_entered.py            # add --list for the names

A recipe with oViT, a cyclic learning rate and int8 training runs on a small model. `sys.setprofile` notes every call
into the installed ovit_engine, so the figures say how many files someone has to open to follow one of these paths.
Dataclass methods and comprehensions count for the file that they stand in.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ovit_engine
from ovit_engine import Calibration, Engine, Recipe
from ovit_engine.certificate.verify import verify_file

ROOT = Path(ovit_engine.__file__).parent
RECIPE = """
modifiers:
  - ovit_prune: {start: 1st, end: 2st, every: 1st, sparsity: {from: 0.3, to: 0.5}, targets: ["re:.*weight"],
                 block: 16, gradients: 8, images_per_gradient: 4, damp: 1.0e-6}
  - cyclic_lr: {max: 1.0e-2, min: 1.0e-3, period: 1st}
  - quantize: {start: 2st}
"""


@contextmanager
def entered(found: dict[str, set[str]], phase: str) -> Iterator[None]:
    """Add the files of ovit_engine that are called inside to `found[phase]`."""
    files = found.setdefault(phase, set())

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            files.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


def own(files: set[str]) -> list[str]:
    """The files below ovit_engine, links to top-level folders resolved to the package's names."""
    places = {str(ROOT): "", str(ROOT.resolve()): ""}
    for link in ("modifiers", "integrations", "recipes"):
        places[str((ROOT / link).resolve())] = link
    names = set()
    for file in files:
        for place, prefix in places.items():
            if file.startswith(place + "/"):
                names.add(f"{prefix}{'/' if prefix else ''}{file[len(place) + 1 :]}")
    return sorted(names)


def run(folder: Path) -> dict[str, set[str]]:
    """Train four steps under the recipe, export and verify, noting what each phase enters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    data = TensorDataset(torch.randn(64, 16), torch.randint(4, (64,)))
    loader = DataLoader(data, batch_size=16)
    found: dict[str, set[str]] = {}
    engine = Engine(model, Recipe.parse(RECIPE), steps_per_epoch=len(loader), epochs=1)
    with entered(found, "prepare"):
        engine.prepare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    engine.attach(optimizer, calibration=Calibration(loader, nn.functional.cross_entropy))
    phases = ["a pruning step", "a pruning step", "a training step", "a training step"]
    for phase, (inputs, targets) in zip(phases, loader, strict=True):
        with entered(found, phase):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    engine.detach()
    with entered(found, "export"):
        engine.export(folder / "model.onnx", inputs[:1], data=loader)
    with entered(found, "verify"):
        verify_file(folder / "model.onnx")
    return found


def main() -> None:
    """Print a line for each phase."""
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder))
    for phase, files in found.items():
        names = own(files)
        packages = {name.rsplit("/", 1)[0] if "/" in name else name for name in names}
        print(f"{phase:16} {len(names):3} files in {len(packages):2} packages")
        if "--list" in sys.argv:
            print(*(f"    {name}" for name in names), sep="\n")


if __name__ == "__main__":
    main()
