"""Surgery: layers are converted where they stand, and everything that knew them still does."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from ovit_engine.quant import (
    QuantConv2d,
    QuantLinear,
    dense_state_dict,
    freeze_batch_norm,
    prepare_quantization,
    quantizers,
    set_enabled,
    set_observing,
    unfreeze_batch_norm,
)


class ConvNet(nn.Module):
    """conv-bn-relu into a depthwise conv, whose output goes to a residual add; then a linear."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = x + self.conv3(x)
        return self.head(x.mean((2, 3)))


CONVS = ("conv1", "conv2", "conv3")


def test_the_layer_object_its_parameters_and_names_stay():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Conv2d(1, 1, 1))
    layers, parameters = list(model), dict(model.named_parameters())
    prepared = prepare_quantization(model, ["0", "2"])
    assert prepared.layers == ("0", "2")
    assert [type(layer) for layer in model] == [QuantLinear, nn.ReLU, QuantConv2d]
    assert all(now is before for now, before in zip(model, layers, strict=True))
    assert all(now is parameters[name] for name, now in model.named_parameters())
    assert dict(model.named_parameters()).keys() == parameters.keys()


def test_prepared_and_not_enabled_computes_the_same_bits():
    model, x = ConvNet().eval(), torch.randn(4, 1, 8, 8)
    before = model(x)
    prepare_quantization(model, [*CONVS, "head"])
    assert torch.equal(model(x), before)


def test_an_optimizer_made_before_trains_it_and_hooks_made_before_run():
    model = nn.Sequential(nn.Linear(4, 3))
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    prepare_quantization(model, ["0"])
    set_observing(model, True)
    set_enabled(model, True)
    before = model[0].weight.clone()
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    handle.remove()
    model(torch.randn(5, 4))
    assert calls == [1]


def test_enabled_it_computes_with_rounded_operands():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.27, 0.014]]))
    prepare_quantization(model, ["0"])
    set_observing(model, True)
    model(torch.tensor([[0.0, 2.55]]))
    set_enabled(model, True)
    # weight: step 0.01 -> (1.27, 0.01); input: step 0.01 -> (0.5, 2.0)
    assert model.eval()(torch.tensor([[0.504, 1.996]])).item() == pytest.approx(1.27 * 0.5 + 0.01 * 2.0, rel=1e-5)


def test_checkpoints_go_both_ways_with_strict():
    dense, prepared = ConvNet(), ConvNet()
    prepare_quantization(prepared, [*CONVS, "head"])
    set_observing(prepared, True)
    prepared.train()(torch.randn(4, 1, 8, 8))
    prepared.load_state_dict(dense.state_dict())
    assert torch.equal(prepared.conv1.weight, dense.conv1.weight)
    other = ConvNet()
    other.load_state_dict(dense_state_dict(prepared.state_dict()))
    assert other.state_dict().keys() == dense.state_dict().keys()


def test_deepcopy_and_pickle_keep_everything():
    model = ConvNet()
    prepare_quantization(model, [*CONVS, "head"])
    set_observing(model, True)
    set_enabled(model, True)
    model(torch.randn(4, 1, 8, 8))
    model.eval()
    x = torch.randn(4, 1, 8, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        set_enabled(other, False)
        assert all(quantizer.enabled for _, quantizer in quantizers(model))


def test_subclasses_with_their_own_forward_are_not_touched_but_named():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4), nn.ReLU())
    prepared = prepare_quantization(model, ["0", "1", "2"])
    assert prepared.layers == ("1",)
    assert prepared.skipped.keys() == {"0", "2"}
    assert "Doubled has a forward of its own" in prepared.skipped["0"]
    assert "torch.nn.modules.activation.ReLU is neither" in prepared.skipped["2"]
    assert type(model[0]) is Doubled
    with pytest.raises(TypeError, match="Doubled"):
        QuantLinear.from_float(model[0])


def test_bad_names_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'1', 'x'"):
        prepare_quantization(model, ["0", "1", "x"])
    with pytest.raises(ValueError, match="wrap it"):
        prepare_quantization(nn.Linear(4, 4), [""])
    prepare_quantization(model, ["0"])
    with pytest.raises(ValueError, match="already prepared for quantization: 0"):
        prepare_quantization(model, ["0"])


def test_every_tensor_is_rounded_once_where_the_runtime_fuses_it():
    model = ConvNet()
    prepared = prepare_quantization(model, [*CONVS, "head"])
    assert prepared.folded == {"conv1": "bn1", "conv2": "bn2"}
    names = {name for name, _ in quantizers(model) if "output" in name}
    # conv1: the input quantizer of conv2 does it; conv2: two readers, so after its ReLU; conv3: at itself
    assert names == {"relu2.output_quantizer", "conv3.output_quantizer"}


def test_a_relu_called_twice_or_as_a_function_holds_no_quantizer():
    class Reused(ConvNet):
        def forward(self, x):
            x = self.relu1(self.bn1(self.conv1(x)))
            y = F.relu(self.bn2(self.conv2(x)))
            return self.relu1(self.conv3(y)) + y + x

    model = Reused()
    prepare_quantization(model, CONVS)
    names = {name for name, _ in quantizers(model) if "output" in name}
    assert names == {"bn1.output_quantizer", "bn2.output_quantizer", "conv3.output_quantizer"}


class Untraceable(ConvNet):
    def forward(self, x):
        if x.sum() > 1e9:
            x = x * 0
        return super().forward(x)


def test_nothing_is_folded_where_no_graph_shows_what_follows():
    model = Untraceable()
    prepared = prepare_quantization(model, CONVS)
    assert prepared.folded == {}
    assert prepared.untraced == tuple(CONVS)
    names = {name for name, _ in quantizers(model) if "output" in name}
    assert names == {f"{name}.output_quantizer" for name in CONVS}


def test_a_part_that_can_be_traced_is_enough():
    class Checks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.stem = ConvNet(), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            if x.shape[1] != 3:
                raise ValueError("three channels")
            return self.body(self.stem(x))

    prepared = prepare_quantization(Checks(), ["stem", *(f"body.{name}" for name in CONVS)])
    assert prepared.folded == {"body.conv1": "body.bn1", "body.conv2": "body.bn2"}
    assert prepared.untraced == ("stem",)


def test_the_branch_of_evaluation_decides():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.other = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)

        def forward(self, x):
            return self.other(self.conv(x)) if self.training else self.bn(self.conv(x))

    model = Branches().train()
    assert prepare_quantization(model, ["conv"]).folded == {"conv": "bn"}
    assert model.training


@pytest.mark.parametrize("where", ["conv1", "bn1"])
def test_a_users_hook_between_convolution_and_norm_keeps_them_apart(where):
    model = ConvNet()
    model.get_submodule(where).register_forward_hook(lambda module, inputs, output: output * 2)
    assert prepare_quantization(model, CONVS).folded == {"conv2": "bn2"}


def test_tracing_leaves_no_trace_in_the_model():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.features, self.cache = nn.Conv2d(2, 2, 1), None, {}
            self.register_buffer("center", torch.full((2, 1, 1), 2.0))

        def forward(self, x):
            self.features = self.conv(x)
            self.cache["mean"] = self.features.mean()
            self.center = self.center * 0.9 + self.features.mean((0, 2, 3))[:, None, None] * 0.1
            return self.features - self.center

    model = Keeps()
    prepare_quantization(model, ["conv"])
    assert model.features is None
    assert model.cache == {}
    assert torch.equal(model.center, torch.full((2, 1, 1), 2.0))
    assert model(torch.ones(1, 2, 3, 3)).shape == (1, 2, 3, 3)


def test_a_convolution_called_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            return self.bn(self.conv(self.conv(x)))

    model = Twice()
    assert prepare_quantization(model, ["conv"]).folded == {}
    assert model.conv.output_quantizer is not None


def test_an_activation_inside_timms_batch_norm_decides_where_to_round():
    model = timm.create_model("test_efficientnet.r160_in1k", pretrained=False, num_classes=3)
    convs = [name for name, module in model.named_modules() if type(module) is nn.Conv2d]
    prepared = prepare_quantization(model, convs)
    assert prepared.folded["conv_stem"] == "bn1"
    # SiLU is not fused: the convolution's output is rounded between normalization and activation
    assert "bn1.drop.output_quantizer" in dict(quantizers(model))


def test_frozen_batch_norm_keeps_its_statistics_through_train_and_copies():
    model = ConvNet()
    prepare_quantization(model, CONVS)
    names = freeze_batch_norm(model)
    assert names == ["bn1", "bn2"]
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = other.bn1.running_mean.clone()
        other.train()
        other(torch.randn(4, 1, 8, 8)).sum().backward()
        assert torch.equal(other.bn1.running_mean, before)
        assert other.bn1.weight.grad is not None
        assert not other.bn1.training
        assert other.relu2.output_quantizer.training
    unfreeze_batch_norm(model)
    assert model.bn1.training
    model(torch.randn(4, 1, 8, 8))
    assert not torch.equal(model.bn1.running_mean, torch.zeros(8))


def test_a_copy_made_frozen_does_not_hold_the_original():
    model = ConvNet()
    freeze_batch_norm(model)
    other = copy.deepcopy(model)
    unfreeze_batch_norm(other)
    assert other.train().bn1.training
    assert not model.train().bn1.training


def test_the_fused_kernel_of_torchs_encoder_layer_is_left() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1).eval()
    x = torch.randn(2, 3, 8)
    before = model(x)
    prepare_quantization(model, ["layers.0.linear1", "layers.0.linear2"])
    torch.testing.assert_close(model(x), before)
    set_observing(model, True)
    set_enabled(model, True)
    model.train()(x)
    with torch.no_grad():  # where the kernel would run
        quantized = model.eval()(x)
    assert not torch.equal(quantized, before)
    with torch.enable_grad():  # where it can't
        torch.testing.assert_close(quantized, model(x).detach())
