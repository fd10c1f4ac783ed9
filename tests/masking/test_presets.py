"""Presets among the targets of a recipe: what is refused, and how they go with others."""

from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import Engine, Recipe, RecipeError
from ovit_engine.masking.parameters import parameter_slots
from ovit_engine.masking.presets import TARGET_PRESETS, is_prunable, match_preset, preset_of
from ovit_engine.masking.targets import check_target_syntax, find_slots
from ovit_engine.modifiers.quantize import Quantize
from tests.loops import recipe
from tests.masking.test_preset_models import Roberta, make, total


def test_layers_that_were_renamed_in_some_blocks_are_noticed() -> None:
    sizes = {f"blocks.{i}.{rest}.weight": 100 for i in range(12) for rest in ("attn.proj", "mlp.fc1", "mlp.fc2")}
    sizes |= {f"blocks.{i}.attn.{'qkv' if i else 'fused'}.weight": 300 for i in range(12)}
    with pytest.warns(
        UserWarning, match=r"leaves 300 weights dense in blocks that it prunes, such as 'blocks.0.attn.fu"
    ):
        match_preset("preset:vit", sizes, owner="VisionTransformer")
    found = match_preset("preset:vit", sizes, others=["blocks.0.attn.fused.weight"], owner="VisionTransformer")
    assert len(found["qkv"]) == 11


def test_a_large_head_says_nothing_about_the_fit() -> None:
    sizes = {f"blocks.0.{rest}.weight": 100 for rest in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    sizes |= {"patch_embed.proj.weight": 100, "head.weight": 100_000}
    assert match_preset("preset:vit", sizes, owner="VisionTransformer")["proj"] == ["blocks.0.attn.proj.weight"]


def test_a_layer_that_was_renamed_is_noticed() -> None:
    """As when qkv is split: the published recipes named parts that the models no longer had, and stayed silent."""
    model: Any = make("deit_tiny_patch16_224", depth=1)
    model.blocks[0].attn.query_key_value = model.blocks[0].attn.qkv
    del model.blocks[0].attn.qkv
    with pytest.raises(ValueError, match=r"^preset:vit finds no qkv in VisionTransformer .*no other preset fits"):
        find_slots(model, ["preset:vit"])


def test_a_preset_that_leaves_most_of_a_model_dense_is_no_match() -> None:
    model = make("deit_tiny_patch16_224", depth=1)  # 442,368 weights in its block
    both = nn.ModuleDict({"vit": model, "rest": nn.Linear(1000, 443)})
    message = "preset:vit takes 442,368 weights of ModuleDict, and 782,456 stay dense, such as 'rest.weight'"
    with pytest.raises(ValueError, match=message):
        find_slots(both, ["preset:vit"])
    with pytest.raises(ValueError, match="no other preset fits"):  # nor is it recommended
        find_slots(both, ["preset:resnet"])
    assert total(both, "preset:vit", "rest.weight") == 442_368 + 443_000  # whoever names the rest means it


def test_what_other_targets_take_is_not_missed() -> None:
    model = make("swin_tiny_patch4_window7_224")
    with pytest.raises(
        ValueError, match=r"'preset:swin' takes the same and 1,548,288 weights more, such as 'layers\.1"
    ):
        find_slots(model, ["preset:vit"])
    assert total(model, "preset:vit", r"re:.*reduction\.weight") == total(model, "preset:swin")
    tower = nn.ModuleDict({"image": make("deit_tiny_patch16_224"), "text": Roberta()})
    assert total(tower, "preset:vit", "preset:roberta") == 5_308_416 + 9_216


def test_a_preset_and_more_come_once_and_in_order() -> None:
    model = make("deit_tiny_patch16_224", depth=2)
    slots = [slot.name for slot in find_slots(model, [r"re:head\.weight", "preset:vit", "blocks.1.mlp.fc1.weight"])]
    assert slots == [slot.name for slot in parameter_slots(model) if slot.name in slots]
    assert len(slots) == len(set(slots)) == 9
    assert slots[-1] == "head.weight"


def test_wrapped_models_match_as_their_own() -> None:
    import timm

    model = timm.create_model("deit_tiny_patch16_224", depth=1)
    wrapped: Any = torch.compile(nn.DataParallel(nn.Sequential(model)), backend="eager")
    assert len(find_slots(wrapped, ["preset:vit"])) == 4


def test_quantized_layers_are_still_layers() -> None:
    import timm

    model = timm.create_model("deit_tiny_patch16_224", depth=1)
    text = "modifiers: [{quantize: {}}, {magnitude_prune: {sparsity: 0.5, targets: preset:vit}}]"
    Engine(model, Recipe.parse(text), steps_per_epoch=1, epochs=1).prepare()
    assert total(model, "preset:vit") == 442_368


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("preset:vti", r"no preset 'vti'; did you mean 'vit'\?"),
        ("preset:efficientnet", r"no preset 'efficientnet'; did you mean 'efficientnetv2'\?"),
        ("preset:", "no preset ''; there are vit, xcit, swin, .*, roberta"),
    ],
)
def test_an_unknown_preset(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_target_syntax(target)
    with pytest.raises(RecipeError, match=f"r.yaml:2:47: magnitude_prune.targets: {message}"):
        recipe(f"magnitude_prune: {{sparsity: 0.5, targets: '{target}'}}")


def test_it_stands_in_a_recipe_as_it_was_written() -> None:
    for written in ("preset:vit", "[preset:vit, 're:head\\.weight']"):
        read = recipe(f"magnitude_prune: {{sparsity: 0.5, targets: {written}}}")
        assert "- preset:vit" in read.dump()
        assert Recipe.parse(read.dump()).modifiers == read.modifiers
    read = recipe("magnitude_prune: {sparsity: 0.5, targets: preset:vit}")
    with pytest.raises(RecipeError, match=r"r.yaml:2:47: magnitude_prune.targets: preset:vit finds no qkv"):
        Engine(nn.Linear(4, 4), read, steps_per_epoch=1, epochs=1).prepare()


def test_quantize_takes_no_preset() -> None:
    made = Quantize(targets=["preset:vit"])
    with pytest.raises(RecipeError, match=r"quantize\.targets: 'preset:vit' is for pruners"):
        Engine(nn.Linear(4, 4), Recipe("made", (made,)), steps_per_epoch=1, epochs=1).prepare()


def test_which_parameters_a_preset_may_take() -> None:
    assert is_prunable(nn.Linear(2, 2), "weight")
    assert not is_prunable(nn.Linear(2, 2), "bias")
    assert is_prunable(nn.Conv2d(1, 4, 3), "weight")  # one input channel is no depthwise convolution
    assert is_prunable(nn.Conv2d(4, 4, 3, groups=2), "weight")
    assert not is_prunable(nn.Conv2d(4, 4, 3, groups=4), "weight")
    assert not is_prunable(nn.Conv1d(4, 8, 3, groups=4), "weight")
    assert is_prunable(nn.MultiheadAttention(4, 2), "in_proj_weight")
    assert is_prunable(nn.MultiheadAttention(4, 2, kdim=2, vdim=2), "k_proj_weight")
    assert not is_prunable(nn.MultiheadAttention(4, 2), "in_proj_bias")
    for module in (nn.Embedding(2, 2), nn.LayerNorm(2), nn.BatchNorm2d(2)):
        assert not is_prunable(module, "weight")


def test_every_preset_says_what_it_is() -> None:
    for name in TARGET_PRESETS:
        preset = preset_of(f"preset:{name}")
        assert preset.models
        assert preset.dense
        assert len(preset.roles) >= 3
