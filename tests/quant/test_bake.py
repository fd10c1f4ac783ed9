"""The deployed form computes what the fake-quantized model computes."""

import copy

import pytest
import timm
import torch
from torch import nn

from ovit_engine.quant import (
    BakedConv2d,
    BakedLinear,
    bake,
    prepare_quantization,
    quantizers,
    set_enabled,
    set_observing,
)


def trained(model, example, names=None):
    """Prepared, observed on three batches, enabled and frozen, in eval mode."""
    torch.manual_seed(1)
    if names is None:
        names = [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    prepare_quantization(model, names)
    model.train()
    set_observing(model, True)
    for _ in range(3):
        model(torch.randn_like(example))
    set_enabled(model, True)
    set_observing(model, False)
    return model.eval()


def assert_same(model, x, tolerance=1e-5):
    """Up to float32 rounding; where a value falls on the edge of two levels it may move by one."""
    expected = model(x)
    got = bake(copy.deepcopy(model))(x)
    far = (got - expected).abs() > tolerance * expected.abs().max()
    assert far.float().mean() < 0.01, far.float().mean()
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 7, 5), (2, 3, 7, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_any_rank(shape, bias):
    model = trained(nn.Sequential(nn.Linear(5, 4, bias=bias)), torch.randn(8, 5))
    x = torch.randn(shape)
    torch.testing.assert_close(bake(copy.deepcopy(model))(x), model(x))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": "same", "groups": 2},
        {"groups": 4, "stride": 2, "bias": False},
        {"padding": 2, "dilation": 2},
        {"padding": (1, 0), "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
def test_convolutions(options):
    x = torch.randn(3, 4, 8, 8)
    assert_same(trained(nn.Sequential(nn.Conv2d(4, 8, 3, **options)), x), x)


def test_batch_norm_folds_exactly_with_negative_and_zero_factors():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.0, 0.5, -0.1, 3.0]))
        model[1].bias.normal_()
        model[0].weight[:, 0] = 0
    x = torch.randn(4, 3, 8, 8)
    model = trained(model, x)
    assert_same(model, x)
    baked = bake(copy.deepcopy(model))
    conv = next(module for module in baked.modules() if isinstance(module, BakedConv2d))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in baked.modules())
    assert (conv.levels[:, 0] == 0).all()
    assert (conv.levels[2] == 0).all()
    assert (conv.weight_scale > 0).all()
    levels = (model[0].weight / model[0].weight_quantizer.scale.view(-1, 1, 1, 1)).round()
    assert torch.equal(conv.levels[1].float(), -levels[1])


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_efficientnet.r160_in1k"])
def test_whole_networks_of_timm(name):
    model = timm.create_model(name, pretrained=False, num_classes=10)
    x = torch.randn(4, 3, 64, 64)
    model = trained(model, x)
    expected, got = model(x), bake(copy.deepcopy(model))(x)
    cosine = torch.nn.functional.cosine_similarity(got, expected)
    assert cosine.min() > 0.99


def test_nothing_of_the_training_form_is_left():
    model = trained(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)), torch.randn(4, 1, 8, 8)
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    baked = bake(copy.deepcopy(model))
    assert not list(quantizers(baked))
    assert not list(baked.parameters())
    weights = {key: value for key, value in baked.state_dict().items() if key.endswith(".weight")}
    assert {key: value.dtype for key, value in weights.items()} == {"0.weight": torch.int8, "3.weight": torch.int8}
    assert weights["3.weight"].shape == (144, 5)
    assert not any(module._forward_hooks for module in baked.modules())
    # the model that trains on is as it was
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert any(module._forward_hooks for module in model.modules())


def test_a_live_range_belongs_to_the_weight_of_this_moment():
    model = trained(nn.Sequential(nn.Linear(4, 2)), torch.randn(8, 4))
    set_observing(model, True)
    with torch.no_grad():
        model[0].weight.mul_(10)
    baked = bake(copy.deepcopy(model))
    assert isinstance(baked[0], BakedLinear)
    torch.testing.assert_close(baked[0].weight_scale, model[0].weight.detach().abs().amax(1) / 127)


def test_a_model_never_enabled_comes_back_as_plain_layers():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    x = torch.randn(2, 1, 8, 8)
    expected, keys = model(x), model.state_dict().keys()
    prepare_quantization(model, ["0", "4"])
    baked = bake(copy.deepcopy(model))
    assert [type(layer) for layer in baked] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Flatten, nn.Linear]
    assert torch.equal(baked(x), expected)
    assert baked.state_dict().keys() == keys
    assert not any(module._forward_hooks for module in baked.modules())


def test_what_is_not_ready_is_named():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    prepare_quantization(model, ["0", "1"])
    set_enabled(model, True)
    with pytest.raises(ValueError, match=r"never saw data.*0\.input_quantizer, 0\.weight_quantizer, 1\.input"):
        bake(model)
    model = trained(nn.Sequential(nn.Linear(4, 2)), torch.randn(8, 4))
    model[0].input_quantizer.enabled.fill_(False)
    with pytest.raises(ValueError, match="0 is quantized by half"):
        bake(model)


def test_hooks_of_the_users_run_in_the_deployed_form_too():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    model[0].register_forward_hook(lambda module, inputs, output: output.relu())
    model[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] - 1,))
    model[3].register_forward_hook(lambda module, inputs, output: output * 3)
    x = torch.randn(8, 1, 8, 8)
    trained(model, x)
    expected = model(x)
    baked = bake(copy.deepcopy(model))
    assert isinstance(baked[1], nn.BatchNorm2d)
    torch.testing.assert_close(baked(x), expected)


def test_a_hook_that_came_after_prepare_keeps_the_norm():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(8, 1, 8, 8)
    trained(model, x)
    model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    expected = model(x)
    torch.testing.assert_close(bake(copy.deepcopy(model))(x), expected)


def test_a_norm_is_folded_where_a_wrapper_is_gone():
    model = nn.DataParallel(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
    prepare_quantization(model, ["module.0"])
    set_observing(model, True)
    x = torch.randn(8, 1, 8, 8)
    model.module(x)
    set_enabled(model, True)
    set_observing(model, False)
    model.eval()
    expected = model.module(x)
    baked = bake(copy.deepcopy(model.module))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in baked.modules())
    torch.testing.assert_close(baked(x), expected)


def test_a_shared_layer_is_baked_in_all_its_places():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    prepare_quantization(model, ["a"])
    set_observing(model, True)
    model["b"](torch.randn(8, 4))
    set_enabled(model, True)
    baked = bake(model)
    assert isinstance(baked["a"], BakedLinear)
    assert baked["b"][0] is baked["a"]


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 1)])
def test_an_int8_layer_tells_the_float_weight_that_it_computes_with(layer):
    x = torch.randn(8, 6) if isinstance(layer, nn.Linear) else torch.randn(8, 6, 3, 3)
    model = trained(nn.Sequential(copy.deepcopy(layer)), x)
    quantizer, before = model[0].weight_quantizer, model[0].weight.detach()
    rounded = quantizer(before)
    baked = bake(copy.deepcopy(model))[0]
    assert baked.weight.dtype == torch.float32  # as Hugging Face's ViT asks, to cast its images
    torch.testing.assert_close(baked.weight, rounded.detach())
    assert baked.state_dict()["weight"].dtype == torch.int8
