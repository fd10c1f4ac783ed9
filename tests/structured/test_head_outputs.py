"""Outputs of heads by hand, where they are recorded, and what a calibration pass leaves as it was."""

import copy
import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ovit_engine import Calibration
from ovit_engine.structured.gates import find_sites, install, set_gate
from ovit_engine.structured.recording import check_sums, is_recording, start_recording, stop_recording, take_sums
from ovit_engine.structured.similarity import OutputTally, mean_similarity, similarities, watched
from tests.modifiers.gated import IMAGES, LABELS, vit

DATA = TensorDataset(IMAGES, LABELS)


def first_outputs(model: Any, images: Tensor) -> Tensor:
    """[samples, heads, tokens x features] of the first block, in float64."""
    double = copy.deepcopy(model).double().eval()
    block = double.blocks[0]
    x = double.patch_embed(images.double())
    x = double.norm_pre(double.pos_drop(torch.cat((double.cls_token.expand(len(x), -1, -1), x), 1) + double.pos_embed))
    qkv = block.norm1(x) @ block.attn.qkv.weight.T + block.attn.qkv.bias
    found = []
    d, width = block.attn.head_dim, block.attn.num_heads * block.attn.head_dim
    for head in range(block.attn.num_heads):
        q, k, v = (qkv[..., part * width + head * d :][..., :d] for part in range(3))
        found.append(((q @ k.transpose(1, 2) / d**0.5).softmax(-1) @ v).flatten(1))
    return torch.stack(found, 1).detach()


def test_a_calibration_pass_compares_the_outputs_of_heads() -> None:
    model = vit(proj_drop_rate=0.3, attn_drop_rate=0.3).train()
    sites = find_sites(model, ["heads"])
    install(sites)
    with watched(sites, "clip", 1.0) as sums:
        Calibration(DATA, nn.functional.cross_entropy).forward(model, count=1, images=64)
    expected = similarities(first_outputs(model, IMAGES).float(), "clip")
    assert torch.allclose(sums[sites[0].name], expected, rtol=1e-4, atol=1e-4)
    assert float(sums[sites[0].name][0, 0]) == 24
    assert torch.allclose(mean_similarity(sites[0], sums[sites[0].name]).diagonal(), torch.ones(4))
    assert list(sums) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]


def test_training_shows_outputs_before_the_gate() -> None:
    model = vit().train()
    sites = find_sites(model, ["heads"])
    install(sites)
    set_gate(sites[0], torch.tensor([True, False, True, True]))
    tally = functools.partial(OutputTally, kernel="shift", temperature=1.0)
    start_recording(sites, tally)
    assert all(map(is_recording, sites))
    for part in IMAGES.split(10):
        model(part).sum().backward()
    with torch.no_grad():
        model.eval()(IMAGES)  # an evaluation is none of it
    copied = copy.deepcopy(model).train()
    copied(IMAGES)
    sums = take_sums(sites)
    expected = similarities(first_outputs(model, IMAGES).float())
    assert torch.allclose(sums["blocks.0.attn.proj"], expected, rtol=1e-4)
    assert not any(part.any() for part in take_sums(sites).values())  # taken
    check_sums(sites[0], sums[sites[0].name], tally)
    with pytest.raises(ValueError, match=r"of 'blocks.0.attn.proj' must be of shape \[4, 4\], not \[3, 4\]"):
        check_sums(sites[0], torch.zeros(3, 4), tally)
    stop_recording(sites)
    assert not any(map(is_recording, sites))


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:Warning")
def test_a_compiled_model_is_recorded_too() -> None:
    found = []
    for backend in (None, "eager"):
        torch._dynamo.reset()
        model = vit(depth=1).train()
        sites = find_sites(model, ["heads"])
        install(sites)
        called = model if backend is None else torch.compile(model, backend=backend)
        called(IMAGES).sum().backward()
        start_recording(sites, functools.partial(OutputTally, kernel="exp", temperature=0.5))
        for _ in range(2):
            called(IMAGES).sum().backward()
        found.append(take_sums(sites))
        stop_recording(sites)
        called(IMAGES).sum().backward()
    for name, sums in found[0].items():
        assert float(sums[0, 0]) == 48
        assert torch.allclose(sums, found[1][name], rtol=1e-4)


def test_where_nothing_came() -> None:
    sites = find_sites(vit(), ["heads"])
    with pytest.raises(ValueError, match=r"no output of 'blocks.0.attn' was seen"):
        mean_similarity(sites[0], torch.zeros(4, 4))


class Noisy(TensorDataset):
    """Augments by all three random states."""

    def __getitem__(self, index: Any) -> Any:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(()) + 0.1 * np.random.randn() + 0.1 * random.random(), y


class WithNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.vit = nn.BatchNorm2d(1), vit(proj_drop_rate=0.2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.vit(self.norm(x))
        return output


def measured(model: nn.Module, data: Any = DATA, **options: Any) -> dict[str, Tensor]:
    sites = find_sites(model, ["heads"])
    install(sites)
    with watched(sites, "shift", 1.0) as sums:
        Calibration(data, nn.functional.cross_entropy, seed=3).forward(
            model, **{"count": 3, "images": 8, "draw": 5, **options}
        )
    return dict(sums)


def test_a_calibration_pass_leaves_all_as_it_was() -> None:
    """G13."""
    torch.manual_seed(7)
    model = WithNorm().train()
    model.vit.blocks[1].eval()
    model.vit.blocks[0].attn.qkv.weight.requires_grad_(False)
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    install(find_sites(model, ["heads"]))
    flags = [module.training for module in model.modules()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    trained = [p.requires_grad for p in model.parameters()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index, union-attr]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    measured(model, Noisy(IMAGES, LABELS))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    for name, parameter in model.named_parameters():
        before = grads[name]
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(parameter.grad, before)  # type: ignore[arg-type]
    assert [p.requires_grad for p in model.parameters()] == trained
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
    assert random.getstate() == states[2]
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_calibration_pass_is_the_same_whoever_makes_it() -> None:
    data = Noisy(IMAGES, LABELS)
    whole = measured(vit(), data)
    torch.rand(5), np.random.rand(5), random.random()
    again, other = measured(vit(), data), measured(vit(), data, draw=6)
    shares = [measured(vit(), data, share=(rank, 2)) for rank in range(2)]
    for name, sums in whole.items():
        assert torch.equal(sums, again[name])
        assert not torch.equal(sums, other[name])
        assert torch.allclose(sums, shares[0][name] + shares[1][name])
        assert [float(share[name][0, 0]) for share in shares] == [16, 8]
