"""Calibration, smoothing and bias correction, each against a float64 reference or the definition."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ovit_engine.quant import (
    CPU,
    Scheme,
    bake,
    calibrate,
    correct_biases,
    prepare_quantization,
    quantizers,
    smooth,
)
from ovit_engine.quant.bias_correction import mean_shift
from ovit_engine.quant.smoothing import smoothing_factors


def block(width: int = 16) -> nn.Sequential:
    """LayerNorm with very different channels, then two layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
    with torch.no_grad():
        model[0].weight.copy_(torch.logspace(-2, 2, width))
        model[0].bias.normal_()
    return model.eval()


def batches(count: int = 4, size: int = 32, width: int = 16) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(size, width, generator=generator),) for _ in range(count)]


def test_batches_of_a_calibration_weigh_the_same() -> None:
    model = nn.Sequential(nn.Linear(4, 2)).eval()
    prepare_quantization(model, ["0"], scheme=Scheme(activation_observer="moving_average"))
    seen = batches(3, width=4)
    calibrate(model, seen)
    lows = torch.stack([batch.double().min() for (batch,) in seen]).mean()
    highs = torch.stack([batch.double().max() for (batch,) in seen]).mean()
    assert model[0].input_quantizer.minimum.item() == pytest.approx(lows.item(), rel=1e-6)
    assert model[0].input_quantizer.maximum.item() == pytest.approx(highs.item(), rel=1e-6)
    assert model[0].input_quantizer.observer.momentum == CPU.momentum  # for whoever trains on
    assert {(bool(q.enabled), bool(q.observing)) for _, q in quantizers(model)} == {(True, False)}


def test_calibration_sees_the_float_model_and_starts_anew() -> None:
    model = block()
    names = ["1", "3"]
    prepare_quantization(model, names, scheme=Scheme(activation_observer="min_max"))
    (first,) = batches(1)
    calibrate(model, [(100 * first[0],)])
    calibrate(model, [first])  # a second time: nothing is left of the first
    again = block()
    prepare_quantization(again, names, scheme=Scheme(activation_observer="min_max"))
    calibrate(again, [first])
    for (name, one), (_, two) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    float_model = block()
    seen = float_model[:3](first[0])
    assert again[3].input_quantizer.maximum.item() == seen.max().item()


def test_dropout_and_batch_norm_rest_while_ranges_are_taken() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    prepare_quantization(model, ["0", "3"])
    calibrate(model, batches(2, width=4))
    assert model[1].num_batches_tracked.item() == 0
    x = torch.ones(4, 4)
    assert torch.equal(model(x), model(x))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.conv = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_layer_that_no_image_reaches_stays_float() -> None:
    model = Branch().eval()
    prepare_quantization(model, ["used", "unused", "conv"])
    assert calibrate(model, batches(1, width=4)) == ("unused", "conv")
    baked = bake(model)
    assert type(baked.unused) is nn.Linear
    assert type(baked.conv) is nn.Conv2d
    with pytest.raises(ValueError, match="no batches"):
        calibrate(block(), [])


@given(st.integers(0, 1000), st.integers(1, 8), st.floats(0.1, 0.9))
@settings(max_examples=40, deadline=None)
def test_factors_are_those_of_the_paper(seed: int, width: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    reach = torch.rand(width, generator=generator) + 0.01
    weights = [torch.randn(3, width, generator=generator), torch.randn(5, width, generator=generator)]
    got = smoothing_factors(reach, weights, strength)
    for index in range(width):
        height = max(float(weight[:, index].abs().max()) for weight in weights)
        assert got[index].item() == pytest.approx(float(reach[index]) ** strength / height ** (1 - strength), rel=1e-6)


def test_empty_channels_get_the_factor_one() -> None:
    factors = smoothing_factors(torch.tensor([0.0, 2.0, 2.0]), [torch.tensor([[1.0, 0.0, 2.0]])], 0.5)
    assert factors.tolist() == [1.0, 1.0, 1.0]


def test_smoothing_leaves_the_float_model_and_mends_the_rounded_one() -> None:
    plain, smoothed, data = block(), block(), batches()
    found = smooth(smoothed, ["1", "3"], data, 0.5)
    assert found.folded == {"0": ("1",)}
    assert found.difference < 1e-5
    x = torch.randn(64, 16)
    torch.testing.assert_close(smoothed(x), plain(x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(smoothed[1].weight, plain[1].weight)
    errors = []
    for model in (copy.deepcopy(plain), smoothed):
        prepare_quantization(model, ["1", "3"], scheme=Scheme(activation_observer="min_max"))
        calibrate(model, data)
        errors.append((model(x) - plain(x)).square().mean().item())
    assert errors[1] < 0.5 * errors[0]


def test_zeros_of_a_sparse_weight_stay() -> None:
    model = block()
    with torch.no_grad():
        model[1].weight[torch.rand(32, 16) < 0.7] = 0
    zeros = model[1].weight == 0
    smooth(model, ["1"], batches(), 0.5)
    assert torch.equal(model[1].weight == 0, zeros)


class Residual(nn.Module):
    """The LayerNorm's output is added too: what a norm after the block does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.fc, self.other, self.kind = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.kind == "residual":
            return y + self.fc(y)
        if self.kind == "twice":
            return self.fc(y) + self.fc(self.norm(x))
        if self.kind == "float":
            return self.fc(y) + self.other(y)
        if self.kind == "functional":
            return nn.functional.linear(y, self.fc.weight)
        if self.kind == "inside":  # a tuple
            return self.fc(y) + torch.cat([y, y], 1)[:, :16]
        return self.fc(y.reshape(-1, 16))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("residual", "norm: its output goes to add"),
        ("twice", "norm is called more than once"),
        ("float", "other stays float"),
        ("functional", "norm: its output goes to linear"),
        ("inside", "norm: its output goes to cat"),
        ("view", "norm: its output goes to reshape"),
    ],
)
def test_a_norm_that_feeds_anything_else_is_refused(kind: str, reason: str) -> None:
    model = Residual(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"no LayerNorm to smooth .*{reason}"):
        smooth(model, ["fc"], batches(), 0.5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_shared_weight_is_refused() -> None:
    model = block()
    model.append(nn.Linear(16, 32))
    model[4].weight = model[1].weight
    with pytest.raises(ValueError, match="a weight is shared"):
        smooth(model, ["1"], batches(), 0.5)


def test_an_unequal_model_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a fold ever be wrong, nobody gets that model."""
    model = block()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("ovit_engine.quant.smoothing._fold", lambda norm, *others: norm.weight.mul_(1.001))
    with pytest.raises(ValueError, match=r"smoothing changes the float model by .*: left as it was"):
        smooth(model, ["1"], batches(), 0.5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_vision_transformer_is_smoothed_but_for_its_last_norm() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2
    )
    layers = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "head"]
    found = smooth(model, layers, [(torch.randn(8, 1, 8, 8),)], 0.5)
    assert found.folded == {
        f"blocks.{i}.norm{n}": (f"blocks.{i}.{layer}",)
        for i in range(2)
        for n, layer in ((1, "attn.qkv"), (2, "mlp.fc1"))
    }
    assert list(found.left) == ["norm"]


@given(st.integers(0, 100), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_the_shift_is_the_mean_difference_of_each_channel(seed: int, channels: int, size: int, axis: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = [size, size, size]
    shape[axis] = channels
    one, two = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    got = mean_shift(one, two, axis)
    for channel in range(channels):
        ours, theirs = (value.select(axis, channel).double().numpy() for value in (one, two))
        assert got[channel].item() == pytest.approx((ours - theirs).sum() / ours.size, abs=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_after_correction_a_layer_has_no_mean_error(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, bias=bias)).eval()
    data = [(torch.rand(32, 16),), (torch.rand(7, 16),)]  # of different sizes: the mean is over images
    x = torch.cat([batch for (batch,) in data])
    expected = model(x).detach()
    prepare_quantization(model, ["0"], scheme=Scheme(per_channel=False))
    calibrate(model, data)
    before = (model(x) - expected).mean(0).abs().max()
    assert correct_biases(model, data) == 1
    after = (model(x) - expected).mean(0).abs().max()
    assert before > 1e-3
    assert after < 1e-6


@pytest.mark.parametrize("norm", [True, False])
def test_a_convolution_hands_its_shift_to_the_norm_behind_it(norm: bool) -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)] if norm else [
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)]  # fmt: skip
    model = nn.Sequential(*parts).eval()
    x = torch.rand(16, 3, 6, 6)
    exact = model[: 2 if norm else 1](x).mean((0, 2, 3)).detach()
    prepare_quantization(model, ["0", str(len(parts) - 1)], scheme=Scheme(per_channel=False))
    calibrate(model, [(x,)])

    @torch.no_grad()
    def shift() -> float:
        conv = model[0]
        y = conv._conv_forward(conv.input_quantizer(x), conv.weight_quantizer(conv.weight), conv.bias)
        return float(((model[1](y) if norm else y).mean((0, 2, 3)) - exact).abs().max())

    before = shift()
    assert correct_biases(model, [(x,)]) == 2
    assert shift() < 0.01 * before
    baked = bake(copy.deepcopy(model))
    assert baked[0].weight_zero_point.shape == baked[0].weight_scale.shape  # as DequantizeLinear wants, folded or not
    torch.testing.assert_close(baked(x), model(x), rtol=0, atol=0.02 * float(model(x).detach().abs().max()))


def test_an_image_with_nan_is_named_and_not_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prepare_quantization(model, ["0"])
    batches = [(torch.randn(3, 4),), (torch.randn(3, 4),)]
    batches[1][0][2, 1] = float("nan")
    with pytest.raises(ValueError, match="calibration batch 2 holds NaN or infinity, first in its item 2"):
        calibrate(model, batches)
