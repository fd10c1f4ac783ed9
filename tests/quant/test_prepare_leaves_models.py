"""Preparing a model changes nothing but its layers: parameters, buffers, attributes and the next forward stay."""

import copy
import io
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ovit_engine import Engine, Recipe
from ovit_engine.quant import FakeQuantize, dense_state_dict, quantizers

QUANTIZE = Recipe.parse("modifiers: [{quantize: {}}]")

FAST = [
    "vit_tiny_patch16_224",
    "resnet18",
    "mobilenetv3_small_050",
    "convnext_atto",
    "levit_128s",
    "xcit_nano_12_p16_224",
]

SLOW = [
    "beit_base_patch16_224", "cait_xxs24_224", "coat_tiny", "coatnet_nano_rw_224", "convit_tiny",
    "crossvit_tiny_240", "cspresnet50", "davit_tiny", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224",
    "densenet121", "dla34", "edgenext_xx_small", "efficientformer_l1", "efficientnet_b0", "eva02_tiny_patch14_224",
    "fastvit_t8", "gernet_s", "ghostnet_050", "hrnet_w18_small", "inception_v3", "mixer_s32_224",
    "mnasnet_050", "mobilenetv2_050", "mobileone_s0", "mobilevit_xxs", "mvitv2_tiny", "nest_tiny", "nfnet_f0",
    "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnetx_002", "repvgg_a0", "resmlp_12_224", "resnetv2_50",
    "rexnet_100", "skresnet18", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "tf_efficientnet_lite0",
    "tresnet_m", "twins_pcpvt_small", "visformer_tiny", "volo_d1_224", "vovnet39a",
]  # fmt: skip


def attributes(model: nn.Module) -> dict[str, Any]:
    """What modules hold beside tensors and children, in a form that compares by value."""
    skipped = {"_parameters", "_buffers", "_modules", "output_quantizer", "norm"}
    return {
        f"{name}.{key}": value if isinstance(value, (int, float, str, bool, tuple, type(None))) else repr(value)[:200]
        for name, module in model.named_modules()
        if not isinstance(module, FakeQuantize)
        for key, value in vars(module).items()
        if key not in skipped and "hooks" not in key
    }


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dense_state_dict(model.state_dict())


def check(model: nn.Module, x: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        expected = model(x)
    held, before, known = dict(model.named_parameters()), copy.deepcopy(tensors(model)), attributes(model)
    Engine(model, QUANTIZE, steps_per_epoch=2, epochs=1).prepare()
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert tensors(model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())
    assert attributes(model) == known
    assert list(quantizers(model))
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    copy.deepcopy(model)


@pytest.mark.filterwarnings("ignore:quantize. :UserWarning")  # of layers that stay float
@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_model_of_timm(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=4)
    size = model.pretrained_cfg["input_size"]  # type: ignore[union-attr,index]
    check(model, torch.randn(2, *size))


class Keeps(nn.Module):
    """Keeps feature maps and a lazily filled cache, and assigns a buffer in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.features: Tensor | None = None
        self.cache: dict[str, Tensor] = {}
        self.register_buffer("center", torch.full((8,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        if self.training:
            self.center = self.center * 0.9 + x.detach().mean(0) * 0.1
        self.features = x
        if "scale" not in self.cache:
            self.cache["scale"] = self.center.abs().mean()
        scaled: Tensor = self.head((x - self.center) / self.cache["scale"])
        return scaled


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_keeps_what_it_computed(training: bool) -> None:
    torch.manual_seed(0)
    model = Keeps().train(training)
    Engine(model, QUANTIZE, steps_per_epoch=2, epochs=1).prepare()
    assert model.features is None
    assert model.cache == {}
    assert torch.equal(model.center, torch.full((8,), 2.0))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    torch.save(model.state_dict(), io.BytesIO())
