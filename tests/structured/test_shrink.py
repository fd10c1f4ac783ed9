"""Heads and units behind gates are really removed (specs/structured-and-tokens.md §9.4)."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ovit_engine.certificate.manifest import Manifest, Part
from ovit_engine.flops import count_flops
from ovit_engine.structured.gates import find_sites, install, installed
from ovit_engine.structured.shrink_model import manifest_of, rebuild, shrink
from tests.structured.shrinking import DIM, HEADS_KEPT, IMAGES, UNITS_KEPT, by_hand, switch, vit

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
    with pytest.raises(RuntimeError, match=r"units can't be removed, since not only 'blocks\.0\.mlp\.fc2' reads them"):
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
    lost = [part.name for part in manifest.parts if len(part.kept) < part.of]
    assert lost == ["blocks.0.attn", "blocks.0.mlp"]


def test_an_averaged_copy_shrinks_by_its_own_gates() -> None:
    model = switch(vit())
    average = torch.optim.swa_utils.AveragedModel(model)
    manifest = shrink(average.module)
    assert manifest == shrink(model)
    assert torch.equal(average(IMAGES), model(IMAGES))
