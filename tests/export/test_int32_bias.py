"""ONNX Runtime adds the bias of an int8 convolution as int32, in units of input scale times weight scale."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ovit_engine.certificate.kernels import open_session, run_outputs
from ovit_engine.export.writer import write_onnx
from ovit_engine.quant import CPU, GPU, bake, prepare_quantization, set_enabled, set_observing

TINY = (1, 3)  # channels with weights of 1e-10 and a bias that matters


def net(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=not norm), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU())
    model.append(nn.Conv2d(8, 4, 3))
    bias = (model[1] if norm else model[0]).bias
    with torch.no_grad():
        model[0].weight[list(TINY)] *= 1e-9
        bias[list(TINY)] = 0.4
    return model


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scheme", [CPU, GPU, replace(CPU, per_channel=False)], ids=["cpu", "gpu", "per tensor"])
def test_a_channel_of_tiny_weights_keeps_its_bias(norm, scheme, tmp_path):
    model, x = net(norm), torch.randn(16, 3, 8, 8)
    prepare_quantization(model, ["0", "3"], scheme=scheme)
    set_observing(model, True)
    model.train()(x)
    set_enabled(model, True)
    set_observing(model, False)
    baked = bake(copy.deepcopy(model))
    conv = baked[0]
    units = conv.bias.double().abs() / (conv.input.scale.double() * conv.weight_scale.double())
    assert units.max() <= 2**30 * 1.000001
    write_onnx(baked, x[:2], tmp_path / "m.onnx")
    with torch.no_grad():
        expected = model.eval()(x).numpy()
    got = run_outputs(open_session(tmp_path / "m.onnx"), [x.numpy()])
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < 0.02, error


def test_other_channels_keep_their_levels_and_scales():
    model, x = net(norm=False), torch.randn(16, 3, 8, 8)
    prepare_quantization(model, ["0", "3"])
    set_observing(model, True)
    model.train()(x)
    set_enabled(model, True)
    scale = model[0].weight_quantizer.scale.clone()
    baked = bake(copy.deepcopy(model))
    usual = [channel for channel in range(8) if channel not in TINY]
    assert torch.equal(baked[0].weight_scale[usual], scale[usual])
    assert (baked[0].levels[usual].abs().amax((1, 2, 3)) == 127).all()
    assert (baked[0].weight_scale[list(TINY)] > scale[list(TINY)]).all()
