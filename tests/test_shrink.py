"""Heads and units behind gates are really removed (specs/structured-and-tokens.md §9.4)."""

import copy
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Mlp
from torch import Tensor, nn

from ovit_engine.flops import count_flops
from ovit_engine.gate_groups import Groups
from ovit_engine.gates import find_sites, install, installed
from ovit_engine.manifest import Manifest, Part
from ovit_engine.masks import Masks
from ovit_engine.quant import prepare_quantization, set_enabled, set_observing
from ovit_engine.shrink import manifest_of, rebuild, shrink
from ovit_engine.shrink_plan import whole_groups
from ovit_engine.targets import parameter_slots
from tests.shrinking import DIM, HEADS_KEPT, IMAGES, UNITS_KEPT, by_hand, switch, vit

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "layer_scale": {"init_values": 0.3},
    "no_qkv_bias": {"qkv_bias": False},
    "qk_norm": {"qk_norm": True},
    "registers": {"reg_tokens": 3},
}


def rows(kept: list[int], width: int, total: int) -> Tensor:
    """Indices of q, k and v rows of heads of `width` features of `total`, by hand."""
    return torch.tensor([c * total + h * width + i for c in range(3) for h in kept for i in range(width)])


def test_a_shrunk_model_computes_what_the_kept_heads_and_units_do() -> None:
    model = vit()
    wanted = by_hand(model, IMAGES, HEADS_KEPT, UNITS_KEPT)
    shrink(switch(model))
    assert (model(IMAGES) - wanted).abs().max() < 1e-5
    assert (model.double()(IMAGES.double()) - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", OPTIONS)
def test_gated_and_removed_agree(kind: str, fused: bool) -> None:
    model = switch(vit(**OPTIONS[kind]))
    for block in model.blocks:
        block.attn.fused_attn = fused
    gated = copy.deepcopy(model)
    scale, head_dim = model.blocks[0].attn.scale, model.blocks[0].attn.head_dim
    shrink(model)
    for images in (IMAGES[:1], IMAGES):
        assert (model(images) - gated(images)).abs().max() < 1e-5
    for block, heads, units in zip(model.blocks, HEADS_KEPT, UNITS_KEPT, strict=True):
        attn, count = block.attn, len(heads)
        assert (attn.num_heads, attn.attn_dim, attn.head_dim, attn.scale) == (count, 8 * count, head_dim, scale)
        assert attn.qkv.out_features == attn.qkv.weight.shape[0] == 3 * attn.attn_dim
        assert attn.proj.in_features == attn.proj.weight.shape[1] == attn.attn_dim
        assert block.mlp.fc1.out_features == block.mlp.fc2.in_features == len(units)
    assert not installed(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not [key for key in model.state_dict() if "gate" in key]


def test_the_kept_rows_and_columns_are_those_of_the_numbers() -> None:
    model = switch(vit())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shrink(model)
    after = model.state_dict()
    for i, (heads, units) in enumerate(zip(HEADS_KEPT, UNITS_KEPT, strict=True)):
        block = f"blocks.{i}"
        kept = rows(heads, 8, DIM)
        for name in ("weight", "bias"):
            assert torch.equal(after[f"{block}.attn.qkv.{name}"], before[f"{block}.attn.qkv.{name}"][kept])
            assert torch.equal(after[f"{block}.mlp.fc1.{name}"], before[f"{block}.mlp.fc1.{name}"][units])
        columns = kept[: len(heads) * 8]
        assert torch.equal(after[f"{block}.attn.proj.weight"], before[f"{block}.attn.proj.weight"][:, columns])
        assert torch.equal(after[f"{block}.mlp.fc2.weight"], before[f"{block}.mlp.fc2.weight"][:, units])
        assert torch.equal(after[f"{block}.mlp.fc2.bias"], before[f"{block}.mlp.fc2.bias"])


def test_parameters_and_operations_are_what_the_formula_says() -> None:
    model = vit()
    before, operations = sum(p.numel() for p in model.parameters()), count_flops(model, IMAGES[:1]).dense
    shrink(switch(model))
    heads, units = sum(4 - len(kept) for kept in HEADS_KEPT), sum(64 - len(kept) for kept in UNITS_KEPT)
    lost = heads * 8 * (3 * (DIM + 1) + DIM) + units * (2 * DIM + 1)
    assert before - sum(p.numel() for p in model.parameters()) == lost
    tokens = 17
    products = heads * (8 * 4 * DIM * tokens + 2 * 8 * tokens * tokens) + units * 2 * DIM * tokens
    assert operations - count_flops(model, IMAGES[:1]).dense == 2 * products


@pytest.mark.parametrize(
    ("name", "heads", "kept_heads", "units", "share", "million", "saving"),
    [
        ("deit_tiny_patch16_224", 3, 2, 768, 0.7, 4.07, 30.7),
        ("deit_small_patch16_224", 6, 4, 1536, 0.6, 14.03, 37.0),
        ("deit_base_patch16_224", 12, 8, 3072, 0.6, 54.48, 37.4),
    ],
)
def test_the_sizes_of_s2vite_after_true_removal(
    name: str, heads: int, kept_heads: int, units: int, share: float, million: float, saving: float
) -> None:
    """The counts of parameters (H11) have broken numbers of units, and leave in the biases of removed rows."""
    with torch.device("meta"):
        model = timm.create_model(name)
    image, kept_units = torch.zeros(1, 3, 224, 224, device="meta"), int(units * share)
    dense = count_flops(model, image).dense
    parts = [
        part
        for i in range(12)
        for part in (
            Part(name=f"blocks.{i}.attn", kind="heads", of=heads, width=64, kept=tuple(range(kept_heads))),
            Part(name=f"blocks.{i}.mlp", kind="units", of=units, width=1, kept=tuple(range(kept_units))),
        )
    ]
    rebuild(model, Manifest(parts=tuple(parts)))
    biases = 12 * (192 * (heads - kept_heads) + units - kept_units)
    broken = 12 * (units * share - kept_units) * 2 * model.embed_dim
    assert round((sum(p.numel() for p in model.parameters()) + biases + broken) / 1e6, 2) == million
    assert round(100 * (1 - count_flops(model, image).dense / dense), 1) == saving


def test_a_manifest_rebuilds_the_small_model() -> None:
    model = switch(vit())
    manifest = shrink(model)
    assert str(manifest) == "4 of 8 heads, 37 of 128 units"
    assert [(part.name, part.kept) for part in manifest.parts if part.kind == "heads"] == [
        ("blocks.0.attn", (0, 2, 3)),
        ("blocks.1.attn", (1,)),
    ]
    read = Manifest.model_validate_json(manifest.model_dump_json())
    empty = rebuild(vit().to("meta"), read)
    small = rebuild(vit(), read)
    small.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(small.eval()(IMAGES), model(IMAGES))
    assert manifest_of(small) == manifest_of(empty) == manifest_of(copy.deepcopy(small)) == manifest == read
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        vit().load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="was shrunk already"):
        rebuild(small, read)


def test_a_model_shrunk_twice_counts_from_the_first() -> None:
    model = switch(vit())
    shrink(model)
    manifest = shrink(switch(model, heads=[[1, 2]], units=[[0, 31]]))
    assert [part.kept for part in manifest.parts] == [(2, 3), (0, 62), (1,), tuple(UNITS_KEPT[1])]
    small = rebuild(vit(), manifest)
    small.load_state_dict(model.state_dict())
    assert torch.equal(small(IMAGES), model(IMAGES))


def test_open_gates_remove_nothing() -> None:
    model = vit()
    wanted = model(IMAGES)
    install(find_sites(model))
    manifest = shrink(model)
    assert not manifest
    assert str(manifest) == "nothing removed"
    assert torch.equal(model(IMAGES), wanted)
    assert rebuild(vit(), manifest)(IMAGES).equal(wanted)


def test_gradients_types_and_freezing_stay() -> None:
    model = switch(vit().double())
    model(IMAGES.double()).sum().backward()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    grad = model.blocks[0].mlp.fc1.weight.grad.clone()
    shrink(model)
    assert not model.blocks[0].attn.qkv.weight.requires_grad
    assert all(p.requires_grad for n, p in model.named_parameters() if n != "blocks.0.attn.qkv.weight")
    assert all(p.dtype is torch.float64 and p.is_leaf for p in model.parameters())
    assert torch.equal(model.blocks[0].mlp.fc1.weight.grad, grad[UNITS_KEPT[0]])


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
    assert [part.kept for part in manifest.parts] == [(0, 1, 4, 5), (14, 15)]
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


class Mixing(nn.Module):
    """Softmax over hidden units: each depends on all others, so that none can be removed."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


class Skipping(Mlp):
    """The hidden units also go past fc2."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.fc1(x)


def test_what_would_compute_something_else_is_refused_before_anything_changes() -> None:
    model = vit()
    model.blocks[1].mlp.act = Mixing()
    switch(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = model(IMAGES)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp: without its removed units it computes something else"):
        shrink(model)
    assert torch.equal(model(IMAGES), wanted)
    assert model.state_dict().keys() == before.keys()


def test_what_else_depends_on_the_units_is_found() -> None:
    model = vit()
    model.blocks[0].mlp = Skipping(DIM, DIM).eval()
    switch(model, units=[[0, 1]])
    with pytest.raises(RuntimeError, match=r"blocks\.0\.mlp: torch-pruning finds that its units can't be taken out"):
        shrink(model)
    assert model.blocks[0].mlp.fc1.out_features == DIM


def test_what_can_not_be_shrunk_is_said() -> None:
    with pytest.raises(ValueError, match=r"VisionTransformer has no gates: harvest\(model\) removes"):
        shrink(vit())
    with pytest.raises(ValueError, match="AveragedModel is a wrapper: give the model inside"):
        shrink(torch.optim.swa_utils.AveragedModel(switch(vit())))
    tied = switch(vit())
    tied.blocks[1].mlp.fc1.weight = tied.blocks[0].mlp.fc1.weight
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.weight is tied to another weight"):
        shrink(tied)
    for kept, of, message in (((0,), 3, "blocks.0.attn had 3 heads of 8"), ((0,), 4, "here is no such module")):
        part = Part(name="blocks.0.attn" if of == 3 else "x", kind="heads", of=of, width=8, kept=kept)
        with pytest.raises(ValueError, match=message):
            rebuild(vit(), Manifest(parts=(part,)))
    with pytest.raises(ValueError, match="heads must rise within 0-3"):
        Part(name="a", kind="heads", of=4, width=8, kept=(2, 2))


def test_a_block_shared_by_two_places_shrinks_once() -> None:
    model = vit()
    model.blocks[1] = model.blocks[0]
    switch(model)
    gated = copy.deepcopy(model)
    manifest = shrink(model)
    assert (model(IMAGES) - gated(IMAGES)).abs().max() < 1e-5
    assert [part.name for part in manifest.parts] == ["blocks.0.attn", "blocks.0.mlp"]


def test_an_averaged_copy_shrinks_by_its_own_gates() -> None:
    model = switch(vit())
    average = torch.optim.swa_utils.AveragedModel(model)
    manifest = shrink(average.module)
    assert manifest == shrink(model)
    assert torch.equal(average(IMAGES), model(IMAGES))
