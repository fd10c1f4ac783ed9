"""Heads and units that zeros have left without effect, and the constants that take their place."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ovit_engine.certificate.manifest import Manifest
from ovit_engine.masking.masks import Masks
from ovit_engine.masking.parameters import parameter_slots
from ovit_engine.quant import prepare_quantization, set_enabled, set_observing
from ovit_engine.structured.shrink_model import harvest, manifest_of, rebuild, shrink
from tests.structured.shrinking import DIM, IMAGES, by_hand, switch, vit

ALL_HEADS, ALL_UNITS = ([0, 1, 2, 3], [0, 1, 2, 3]), (list(range(64)), list(range(64)))


@torch.no_grad()
def pruned(model: Any, *, values: Any = (), readers: Any = (), fc1: Any = (), fc2: Any = (), block: int = 0) -> Any:
    """`model` with the value rows or proj columns of heads, the fc1 rows or fc2 columns of units zero in one block."""
    attn, mlp = model.blocks[block].attn, model.blocks[block].mlp
    for head in values:
        attn.qkv.weight[2 * DIM + head * 8 : 2 * DIM + head * 8 + 8] = 0
    for head in readers:
        attn.proj.weight[:, head * 8 : head * 8 + 8] = 0
    mlp.fc1.weight[list(fc1)] = 0
    mlp.fc2.weight[:, list(fc2)] = 0
    return model


def kept(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    return {part.name: part.kept for part in manifest.parts if len(part.kept) < part.of}


def test_a_harvested_model_computes_what_the_pruned_one_did() -> None:
    model = pruned(vit(), values=[1], readers=[3], fc1=[0, 9], fc2=[9, 10, 63])
    wanted = by_hand(model, IMAGES, ALL_HEADS, ALL_UNITS)
    without_constants = by_hand(
        model, IMAGES, ([0, 2], ALL_HEADS[1]), (sorted(set(range(64)) - {0, 9, 10, 63}), ALL_UNITS[1])
    )
    manifest = harvest(model)
    units = tuple(sorted(set(range(64)) - {0, 9, 10, 63}))
    assert kept(manifest) == {"blocks.0.attn": (0, 2), "blocks.0.mlp": units}
    assert (model(IMAGES) - wanted).abs().max() < 1e-5
    assert (without_constants - wanted).abs().max() > 0.01  # a constant is not nothing
    small = rebuild(vit(), manifest)
    small.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(small(IMAGES), model(IMAGES))


def test_the_constants_are_those_of_the_formula() -> None:
    model = pruned(vit(), values=[1], fc1=[5])
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    proj = (
        attn.proj.bias.double()
        + attn.proj.weight.double()[:, 8:16] @ attn.qkv.bias.double()[2 * DIM + 8 : 2 * DIM + 16]
    )
    fc2 = mlp.fc2.bias.double() + mlp.fc2.weight.double()[:, 5] * nn.functional.gelu(mlp.fc1.bias.double()[5])
    harvest(model)
    assert (attn.proj.bias - proj).abs().max() < 1e-7
    assert (mlp.fc2.bias - fc2).abs().max() < 1e-7


@given(st.data())
@settings(max_examples=8, deadline=None)
def test_any_zeros_in_any_block(data: st.DataObject) -> None:
    some = {
        name: data.draw(st.sets(st.integers(0, count - 1)))
        for name, count in (("values", 4), ("readers", 4), ("fc1", 64), ("fc2", 64))
    }
    model = pruned(vit(), block=1, **some)
    wanted = by_hand(model, IMAGES, ALL_HEADS, ALL_UNITS)
    manifest = kept(harvest(model))
    assert (model(IMAGES) - wanted).abs().max() < 2e-5
    heads = sorted(set(range(4)) - some["values"] - some["readers"]) or [0]
    units = sorted(set(range(64)) - some["fc1"] - some["fc2"]) or [0]
    assert list(manifest.get("blocks.1.attn", range(4))) == heads
    assert list(manifest.get("blocks.1.mlp", range(64))) == units


def test_nothing_dead_nothing_done() -> None:
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not harvest(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():  # query and key rows, single value rows and part of a column leave a head alive
        model.blocks[0].attn.qkv.weight[:DIM] = 0
        model.blocks[0].attn.qkv.weight[2 * DIM : 2 * DIM + 7] = 0
        model.blocks[0].mlp.fc2.weight[1:, 3] = 0
    assert not harvest(model)


def test_a_constant_needs_a_bias_to_go_to() -> None:
    model = pruned(vit(), fc1=[0, 1, 2], values=[2])
    for name in ("mlp.fc2", "attn.proj"):
        layer = model.blocks[0].get_submodule(name)
        layer.bias = None
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[1] = 0  # gelu(0) = 0: this one adds nothing
    wanted = model(IMAGES)
    assert kept(harvest(model)) == {"blocks.0.mlp": tuple(i for i in range(64) if i != 1)}
    assert (model(IMAGES) - wanted).abs().max() < 1e-5
    silent = pruned(vit(qkv_bias=False), values=[2])
    assert kept(harvest(silent)) == {"blocks.0.attn": (0, 1, 3)}


def test_zeroed_checkpoints_of_s2vite_need_their_constants() -> None:
    """Released S2ViTE masks q, k and v rows and leaves all biases: such a head is uniform attention to a constant."""
    model = vit()
    with torch.no_grad():
        for c in range(3):
            model.blocks[0].attn.qkv.weight[c * DIM + 8 : c * DIM + 16] = 0
    wanted = model(IMAGES)
    gated = switch(copy.deepcopy(model), heads=[[0, 2, 3]], units=[])
    shrink(gated)
    assert (gated(IMAGES) - wanted).abs().max() > 0.05
    harvest(model)
    assert (model(IMAGES) - wanted).abs().max() < 1e-5
    assert model.blocks[0].attn.num_heads == 3


def masks_of(model: nn.Module, pattern: Any, *names: str) -> Masks:
    masks = Masks()
    for slot in parameter_slots(model):
        if slot.name.endswith(names):
            masks.set(slot, slot.tensor != 0, pattern)
    return masks


def test_masks_and_momenta_are_cut_along() -> None:
    model = pruned(vit(), values=[1], fc1=[0, 9], fc2=[10])
    masks = masks_of(model, "unstructured", "qkv.weight", "fc1.weight", "fc2.weight")
    before = {name: masks.get(name) for name in masks.names()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model(IMAGES).square().mean().backward()
    optimizer.step()
    masks.project()
    wanted, momentum = model(IMAGES), optimizer.state[model.blocks[0].mlp.fc1.weight]["momentum_buffer"].clone()
    harvest(model, optimizer=optimizer, masks=masks)
    units = [i for i in range(64) if i not in (0, 9, 10)]
    assert masks.get("blocks.0.mlp.fc1.weight").equal(before["blocks.0.mlp.fc1.weight"][units])
    assert masks.get("blocks.1.mlp.fc1.weight").equal(before["blocks.1.mlp.fc1.weight"])
    assert optimizer.state[model.blocks[0].mlp.fc1.weight]["momentum_buffer"].equal(momentum[units])
    assert (model(IMAGES) - wanted).abs().max() < 1e-5


def test_dead_units_leave_a_pattern_by_whole_groups() -> None:
    model = pruned(vit(), fc1=[0, 1, 2, 3, 5, 6], fc2=[7])
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.view(DIM, -1, 4)[..., 2:] = 0  # half of the columns die, two of each four
    masks = masks_of(model, "2:4", "0.mlp.fc2.weight")
    wanted, weight = model(IMAGES), model.blocks[0].mlp.fc2.weight.detach().clone()
    manifest = harvest(model, masks=masks)
    assert kept(manifest) == {"blocks.0.mlp": tuple(range(4, 64))}
    assert (model(IMAGES) - wanted).abs().max() < 1e-5
    assert torch.equal(model.blocks[0].mlp.fc2.weight, weight[:, 4:])  # dead ones that stay, stay as they are
    assert ((model.blocks[0].mlp.fc2.weight.view(DIM, -1, 4) != 0).sum(-1) <= 2).all()


@pytest.mark.parametrize("attention", [False, True])
def test_what_is_rounded_is_folded_as_it_is_rounded(attention: bool) -> None:
    model = pruned(vit(), values=[1], readers=[3], fc1=[0, 9], fc2=[10])
    with torch.no_grad():  # attention of head 1 is uniform: rounded, it sums to something else for each count of tokens
        model.blocks[0].attn.qkv.weight[DIM + 8 : DIM + 16] = 0
    layers = [name for name, module in model.named_modules() if name.startswith("blocks") and type(module) is nn.Linear]
    prepare_quantization(model, layers, attention=["blocks.0.attn"] if attention else [])
    set_observing(model, True)
    model.train()
    model(IMAGES)
    model.eval()
    set_observing(model, False)
    set_enabled(model, True)
    wanted = model(IMAGES)
    manifest = kept(harvest(model))
    # rounded attention weights do not sum to one: a constant value is no constant output
    assert manifest["blocks.0.attn"] == ((0, 1, 2) if attention else (0, 2))
    assert len(manifest["blocks.0.mlp"]) == 61
    assert (model(IMAGES) - wanted).abs().max() < 1e-5


def test_gates_go_first() -> None:
    model = switch(pruned(vit(), fc1=[1, 2]))
    with pytest.raises(ValueError, match=r"the model has gates: shrink\(model\) first"):
        harvest(model)
    wanted = model(IMAGES)
    shrink(model)
    manifest = harvest(model)
    assert (model(IMAGES) - wanted).abs().max() < 1e-5
    assert kept(manifest)["blocks.0.mlp"] == (0, *range(4, 64, 2))
    assert manifest == manifest_of(model)
    with pytest.raises(ValueError, match="Sequential has no heads to gate"):
        harvest(nn.Sequential(nn.Linear(2, 2)))


def test_a_model_with_mlps_alone_is_harvested() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = copy.deepcopy(vit().blocks[0].mlp)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.mlp(x)
            return y

    model = Block()
    with torch.no_grad():
        model.mlp.fc1.weight[3] = 0
    x = torch.randn(2, 3, DIM)
    wanted = model(x)
    assert len(harvest(model).parts) == 1
    assert (model(x) - wanted).abs().max() < 1e-5
