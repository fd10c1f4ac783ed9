"""What goes along when heads and units leave: optimizers, masks, patterns and ranges of int8."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ovit_engine.export.deploy import smaller
from ovit_engine.masking.masks import Masks
from ovit_engine.masking.parameters import parameter_slots
from ovit_engine.quant import prepare_quantization, set_enabled, set_observing
from ovit_engine.structured.groups import Groups
from ovit_engine.structured.removal import whole_groups
from ovit_engine.structured.shrink_model import shrink
from tests.structured.shrinking import DIM, HEADS_KEPT, IMAGES, UNITS_KEPT, switch, vit
from tests.structured.test_shrink import rows

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, 0.01, amsgrad=True),
    "fused": lambda params: torch.optim.AdamW(params, 0.01, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, 0.01, momentum=0.5, centered=True),
}


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    images = IMAGES.to(next(model.parameters()).dtype)
    model(images).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_next_step_is_that_of_the_gated_model(kind: str) -> None:
    model = switch(vit().double())  # in float32 the keys' bias has a gradient of noise alone, which Adam scales up
    groups = [[p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() < 2]]
    optimizer = OPTIMIZERS[kind]([{"params": group} for group in groups])
    for _ in range(3):
        step(model, optimizer)
    both = copy.deepcopy((model, optimizer))
    shrink(model, optimizer=optimizer)
    for _ in range(2):
        step(model, optimizer)
        step(*both)
    assert len(optimizer.state) == len(list(model.parameters()))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    shrink(both[0])  # what is kept of the gated one is the same, entry by entry
    for (name, small), large in zip(model.named_parameters(), both[0].parameters(), strict=True):
        assert torch.allclose(small, large, rtol=1e-9, atol=1e-10), name


class Opaque(torch.optim.SGD):
    """Keeps something of each parameter that is no tensor of its shape."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["gram"] = torch.zeros(len(parameter), 3)


def test_an_optimizer_that_cannot_follow_is_refused_and_nothing_changes() -> None:
    model = switch(vit())
    opaque, flat = Opaque(model.parameters(), 0.0), torch.optim.LBFGS(model.parameters())
    step(model, opaque)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"Opaque keeps 'gram' of 'blocks\.0\.attn\.qkv\.\w+' in a form that we"):
        shrink(model, optimizer=opaque)
    with pytest.raises(ValueError, match="LBFGS keeps a list of parameters of its own"):
        shrink(model, optimizer=flat)
    with pytest.raises(ValueError, match="holds no parameter that becomes smaller"):
        shrink(model, optimizer=torch.optim.SGD(vit().parameters(), 0.1))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_factored_moments_are_cut_along_the_axis_they_have() -> None:
    model = switch(vit())
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer)
    fc1, fc2 = model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc2.weight
    before = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in (fc1, fc2)]
    shrink(model, optimizer=optimizer)
    after = [optimizer.state[p] for p in (model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc2.weight)]
    units = UNITS_KEPT[0]
    assert torch.equal(after[0]["row_var"], before[0]["row_var"][units])
    assert torch.equal(after[0]["col_var"], before[0]["col_var"])
    assert torch.equal(after[1]["row_var"], before[1]["row_var"])
    assert torch.equal(after[1]["col_var"], before[1]["col_var"][:, units])
    step(model, optimizer)


def masked(model: nn.Module, pattern: Any = "unstructured", *names: str) -> Masks:
    """Random masks of the named weights (2:4: the last two of each four)."""
    masks, generator = Masks(), torch.Generator().manual_seed(5)
    for slot in parameter_slots(model):
        if slot.name.endswith(names):
            mask = torch.rand(slot.tensor.shape, generator=generator) > 0.5
            if pattern == "2:4":
                mask = (torch.arange(mask.numel()) % 4 < 2).view(mask.shape)
            if isinstance(pattern, dict):
                tall, wide = pattern["block"]
                mask = mask[::tall, ::wide].repeat_interleave(tall, 0).repeat_interleave(wide, 1)
            masks.set(slot, mask, pattern)
    return masks


def test_masks_are_cut_along() -> None:
    model = switch(vit())
    masks = masked(model, "unstructured", "qkv.weight", "fc2.weight", "patch_embed.proj.weight")
    before = {name: masks.get(name) for name in masks.names()}
    model.train()
    gated = copy.deepcopy(model)
    shrink(model, masks=masks)
    assert (model(IMAGES) - gated(IMAGES)).abs().max() < 1e-5
    assert model.training
    for i, (heads, units) in enumerate(zip(HEADS_KEPT, UNITS_KEPT, strict=True)):
        qkv, fc2 = f"blocks.{i}.attn.qkv.weight", f"blocks.{i}.mlp.fc2.weight"
        assert masks.get(qkv).equal(before[qkv][rows(heads, 8, DIM)])
        assert masks.get(fc2).equal(before[fc2][:, units])
    assert masks.get("patch_embed.proj.weight") is not None
    assert masks.names() == list(before)
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    masks.project()
    for slot in parameter_slots(model):
        if (mask := masks.get(slot.name)) is not None:
            assert not slot.tensor[~mask].any()


@given(st.integers(1, 40), st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_whole_groups_by_brute_force(count: int, group: int, data: st.DataObject) -> None:
    keep = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    wanted = [any(keep[j] for j in range(count) if j // group == i // group) for i in range(count)]
    if not any(wanted):
        wanted = [i < group for i in range(count)]
    assert whole_groups(torch.tensor(keep), Groups(count, group)).tolist() == wanted


@pytest.mark.parametrize(
    ("pattern", "names", "units"),
    [
        ("2:4", ("fc2.weight",), [0, 1, 2, 3, 4, 5, 6, 7, 40, 41, 42, 43, 60, 61, 62, 63]),
        ({"block": [1, 2]}, ("fc2.weight",), [2, 3, 4, 5, 6, 7, 40, 41, 62, 63]),
        ({"block": [2, 1]}, ("fc1.weight",), [2, 3, 4, 5, 6, 7, 40, 41, 62, 63]),
        ({"block": [2, 4]}, ("fc1.weight", "fc2.weight"), [0, 1, 2, 3, 4, 5, 6, 7, 40, 41, 42, 43, 60, 61, 62, 63]),
        ("2:4", ("fc1.weight", "qkv.weight"), [3, 5, 6, 40, 63]),
    ],
)
def test_a_pattern_holds_units_in_their_groups(pattern: Any, names: tuple[str, ...], units: list[int]) -> None:
    model = switch(vit())
    masks = masked(model, pattern, *names)
    gated = copy.deepcopy(model)
    manifest = shrink(model, masks=masks)
    assert (model(IMAGES) - gated(IMAGES)).abs().max() < 1e-5
    part = next(part for part in manifest.parts if part.name == "blocks.1.mlp")
    assert list(part.kept) == units
    off = [i for i, unit in enumerate(units) if unit not in UNITS_KEPT[1]]
    assert not model.blocks[1].mlp.fc2.weight[:, off].any()
    weight = model.blocks[1].mlp.fc2.weight
    if pattern == "2:4" and "fc2.weight" in names:
        assert ((weight.view(DIM, -1, 4) != 0).sum(-1) <= 2).all()
    if isinstance(pattern, dict):
        for name in names:
            mask = masks.get(f"blocks.1.mlp.{name}")
            tall, wide = pattern["block"]
            tiles = mask.view(mask.shape[0] // tall, tall, mask.shape[1] // wide, wide)
            assert (tiles == tiles[:, :1, :, :1]).all()


def test_heads_narrower_than_a_group_go_by_groups() -> None:
    model = switch(vit(num_heads=16), heads=[[0, 5], [15]], units=[])
    masks = masked(model, "2:4", "proj.weight")
    gated = copy.deepcopy(model)
    manifest = shrink(model, masks=masks)
    assert [part.kept for part in manifest.parts if part.kind == "heads"] == [(0, 1, 4, 5), (14, 15)]
    assert (model(IMAGES) - gated(IMAGES)).abs().max() < 1e-5


def quantized(model: Any, *, observing: bool = False) -> Any:
    layers = [name for name, module in model.named_modules() if name.startswith("blocks") and type(module) is nn.Linear]
    prepare_quantization(model, layers)
    set_observing(model, True)
    model.train()
    model(IMAGES)
    model.eval()
    set_observing(model, observing)
    set_enabled(model, True)
    return model


@pytest.mark.parametrize("observing", [False, True])
def test_ranges_of_rows_are_cut_along(observing: bool) -> None:
    model = quantized(switch(vit()), observing=observing)
    gated = copy.deepcopy(model)
    scale = model.blocks[0].mlp.fc1.weight_quantizer.scale.clone()
    shrink(model)
    assert torch.equal(model.blocks[0].mlp.fc1.weight_quantizer.scale, scale[UNITS_KEPT[0]])
    assert model.blocks[0].attn.qkv.weight_quantizer.minimum.shape == (3 * 3 * 8,)
    assert model.blocks[0].mlp.fc2.weight_quantizer.scale.shape == (DIM,)
    assert bool(model.blocks[0].mlp.fc2.weight_quantizer.observing) is observing
    error = (model(IMAGES) - gated(IMAGES)).abs().max()
    assert (error < 1e-5) != observing  # live ranges follow the smaller weights


def test_ranges_of_weights_that_are_still_watched_stay_those_of_the_whole_model() -> None:
    """What is exported rounds as the model that was trained, whose largest weights may be among those that leave."""
    model = quantized(switch(vit()), observing=True)
    gated = copy.deepcopy(model)
    smaller(model, Masks(), dead=False)
    assert model.blocks[1].attn.num_heads == 1
    assert (model(IMAGES) - gated(IMAGES)).abs().max() < 1e-5
