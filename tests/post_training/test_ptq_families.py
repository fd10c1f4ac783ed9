"""Post-training quantization, 2:4, export and certificate of the families of the oViT paper, with random weights."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import interpolate

from ovit_engine import Recipe
from ovit_engine.certificate.verify import verify_file
from ovit_engine.masking.masks import Masks
from ovit_engine.masking.parameters import parameter_slots
from ovit_engine.post_training.ptq import ptq
from ovit_engine.pruning.patterns import NM

# name, arguments, side of the image, groups, share of the weights in int8 at least
SMALL: dict[str, tuple[str, dict[str, Any], int, str, float]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}, 32,
            "linear, attention, patch_embed, head, layer_norm", 1.0),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 32,
                        "depth": 2, "num_heads": 2}, 32, "linear, attention, head", 0.75),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1),
             "num_heads": (2, 2)}, 32, "linear, attention", 0.9),
    "xcit": ("xcit_nano_12_p16_224", {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2,
             "cls_attn_layers": 1}, 32, "linear, conv, attention", 0.5),
    "efficientformer": ("efficientformer_l1", {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 16, 32)}, 224,
                        "linear, conv, attention", 0.5),
    "resnet50-d": ("resnet50d", {"layers": (1, 1, 1, 1)}, 64, "linear, conv", 0.9),
    "efficientnet": ("test_efficientnet", {}, 64, "linear, conv", 0.9),
}  # fmt: skip
WHOLE = (
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224",
    "efficientformer_l1", "resnet50d", "efficientnetv2_rw_t",
)  # fmt: skip


def spread_out(model: nn.Module) -> nn.Module:
    """Random weights that tell images apart, and statistics that are not those of a new batch-norm."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
            module.weight.data.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator) / fan_in**0.5)
    return model.eval()


def two_of_four(model: nn.Module) -> Masks:
    """Masks on every weight of a layer whose inputs come in fours, set."""
    masks, pattern = Masks(), NM(2, 4)
    for slot in parameter_slots(model):
        weight = slot.tensor
        if isinstance(slot.module, (nn.Linear, nn.Conv2d)) and weight.ndim > 1 and weight.shape[1] % 4 == 0:
            before = weight.detach().std()
            masks.set(slot, pattern.mask(weight.detach().abs(), 0.5), "2:4")
            weight.data.mul_(before / weight.detach().std())  # outputs as far apart as they were
    return masks


@torch.no_grad()
def without_ties(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The half of the images of whose class random weights are the surest; a rounding turns the others either way."""
    first, second = model(images).topk(2, dim=1).values.T
    return images[(first - second).topk(len(images) // 2).indices]


def quantized(model: nn.Module, side: int, options: str, path: Path) -> Any:
    """The comparison with float of a 2:4 sparse int8 file, which is verified from its bytes."""
    masks = two_of_four(model)
    generator = torch.Generator().manual_seed(1)
    # patches of colour: white noise is one image to a network
    images = interpolate(torch.randn(80, 3, 7, 7, generator=generator), size=side, mode="bilinear")
    recipe = Recipe.parse(f"modifiers: [{{quantize: {options}}}]")
    data = [(without_ties(model, images[16:]), None)]
    found = ptq(model, recipe, [(images[:16],)], path, example_inputs=images[:1], data=data, masks=masks)
    certificate = verify_file(path)
    assert {layer.name for layer in certificate.pruned} == set(masks.names())
    assert [layer.broken_groups for layer in certificate.pruned] == [0] * len(masks.names())
    return found


@pytest.mark.parametrize("family", SMALL)
def test_a_small_model_of_each_family(family: str, tmp_path: Path) -> None:
    name, arguments, side, groups, share = SMALL[family]
    torch.manual_seed(0)
    model = spread_out(timm.create_model(name, pretrained=False, num_classes=10, **arguments))
    found = quantized(model, side, f"{{groups: [{groups}]}}", tmp_path / "model.onnx")
    certificate = found.certificate
    assert certificate.int8_share >= share
    assert certificate.integer_kernels >= len(certificate.quantized)
    assert found.parity.cosine > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_of_each_family(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = spread_out(timm.create_model(name, pretrained=False, num_classes=10))
    found = quantized(model, 224, "{}", tmp_path / "model.onnx")
    assert found.certificate.int8_share > 0.8
    assert found.parity.cosine > 0.95
