"""Trainings that tests kill: they are built in other processes, so they stand in a module that imports little."""

from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from ovit_engine.training.verify_resume import Job, Setup

TARGETS = r"targets: ['re:blocks.*(qkv|proj|fc1|fc2)\.weight']"


def make_optimizer(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3)


def recorded(file: Path | None, output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy; it adds the resident memory of the process, in pages, to a file at about every 50th call."""
    if file is not None and torch.rand((), generator=_CHANCE) < 0.02:
        with file.open("a") as stream:
            stream.write(Path("/proc/self/statm").read_text().split()[1] + "\n")
    return nn.functional.cross_entropy(output, target)


_CHANCE = torch.Generator()


def build(file: Path | None = None) -> Setup:
    """A vision transformer of one block with dropout, on 32 images of 8 x 8 pixels."""
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, proj_drop_rate=0.1, **sizes)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(32, 1, 8, 8, generator=generator), torch.randint(4, (32,), generator=generator)
    return Setup(model, TensorDataset(images, labels), partial(recorded, file), make_optimizer)


class Counting(nn.Module):
    """Remembers in Python how often it was called: what no state dict holds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        output: Tensor = self.inner(x) * (1 + 0.01 * self.calls)
        return output


def build_counting() -> Setup:
    setup = build()
    return Setup(Counting(setup.model), setup.dataset, setup.loss_fn, setup.optimizer)


def build_nothing() -> Setup:
    raise ValueError("there are no images\nand more lines")


def job(*modifiers: str, steps: int = 24, every: int = 5, **options: object) -> Job:
    """In epochs of 4 steps of 8 images."""
    text = "\n".join(["modifiers:", *(f"  - {modifier}" for modifier in modifiers)])
    settings = {"build": build, "steps_per_epoch": 4, "epochs": steps // 4, "batch_size": 8, **options}
    return Job(recipe=text, every=every, **settings)  # type: ignore[arg-type]
