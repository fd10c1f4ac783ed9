"""A tiny vision transformer, its batches, and scores of gates by another way, for tests of modifiers with gates."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ovit_engine import Calibration, Engine
from ovit_engine.structured.gates import GATE, GateSite, find_sites, installed
from tests.loops import recipe

IMAGES = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(5))
LABELS = torch.randint(4, (24,), generator=torch.Generator().manual_seed(6))


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 4, **options}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)


def batch(step: int) -> tuple[Tensor, Tensor]:
    part = slice(step * 8 % 24, step * 8 % 24 + 8)
    return IMAGES[part], LABELS[part]


def engine_for(model: nn.Module, modifier: str, steps: int = 10) -> Engine:
    return Engine(model, recipe(modifier), steps_per_epoch=steps, epochs=1).prepare()


def train(
    model: nn.Module,
    engine: Engine,
    steps: int,
    *,
    rate: float = 0.05,
    each: Callable[[int], Any] = lambda step: None,
    calibration: Calibration | None = None,
    first: int = 0,
    state: dict[str, Any] | None = None,
) -> Engine:
    """So many steps of SGD from step `first` on; `each` is called with the number of steps made, first with `first`.

    `state` is of the optimizer that goes on.
    """
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    if state is not None:
        optimizer.load_state_dict(state)
    engine.attach(optimizer, calibration=calibration)
    model.train()
    each(first)
    for step in range(first, first + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        each(step + 1)
    return engine


def gates_of(model: nn.Module) -> dict[str, list[int]]:
    """Indices of what is on, by site name."""
    return {site.name: site.gate.nonzero().flatten().tolist() for site in installed(model)}


class _Times(nn.Module):
    """A linear layer whose input is multiplied by a float gate."""

    def __init__(self, linear: Any, gate: Tensor, width: int) -> None:
        super().__init__()
        self.weight, self.bias, self.gate, self.width = linear.weight, linear.bias, gate, width

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x * self.gate.repeat_interleave(self.width), self.weight, self.bias)


def explicit_scores(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean over samples of |dL/dgate| in float64, one sample at a time, from float gates in place of ours."""
    double = copy.deepcopy(model).double().train()
    sites: list[GateSite] = find_sites(double)
    gates = {site.name: site.gate.double().requires_grad_(True) for site in sites}
    for site in sites:
        owner = double.get_submodule(site.owner_name)
        assert GATE in site.linear._buffers
        setattr(owner, site.name.rpartition(".")[2], _Times(site.linear, gates[site.name], site.width))
    totals = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    count = 0
    for x, y in batches:
        for sample, label in zip(x.double(), y, strict=True):
            loss = nn.functional.cross_entropy(double(sample[None]), label[None]) / len(x)
            grads = torch.autograd.grad(loss, list(gates.values()))
            for total, grad in zip(totals.values(), grads, strict=True):
                total += grad.abs()
            count += 1
    return {name: total.detach() / count for name, total in totals.items()}
