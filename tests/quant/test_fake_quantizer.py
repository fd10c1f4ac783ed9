"""FakeQuantize: what it observes, when it rounds, and that its state travels."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from ovit_engine.quant import CPU, Scheme


def switched(quantizer, *, enabled=True, observing=True):
    quantizer.enabled.fill_(enabled)
    quantizer.observing.fill_(observing)
    return quantizer


def test_as_installed_it_is_the_identity_and_sees_nothing():
    quantizer = CPU.activation_quantizer()
    x = torch.randn(4)
    assert quantizer(x) is x
    assert not quantizer.observed


def test_the_range_is_a_moving_average_that_starts_at_the_first_batch():
    quantizer = switched(Scheme(momentum=0.5).activation_quantizer(), enabled=False)
    quantizer(torch.tensor([-1.0, 3.0]))
    assert (quantizer.minimum.item(), quantizer.maximum.item()) == (-1.0, 3.0)
    quantizer(torch.tensor([-3.0, 4.0]))
    assert (quantizer.minimum.item(), quantizer.maximum.item()) == (-2.0, 3.5)
    assert quantizer.scale.item() == pytest.approx(5.5 / 255)
    assert quantizer.zero_point.item() == 93  # 2 / (5.5 / 255) = 92.7


def test_it_watches_activations_only_in_training_and_only_while_observing():
    quantizer = switched(CPU.activation_quantizer()).eval()
    quantizer(torch.tensor([1.0]))
    assert not quantizer.observed
    switched(quantizer, observing=False).train()
    quantizer(torch.tensor([1.0]))
    assert not quantizer.observed


def test_enabled_without_a_range_it_is_the_identity():
    quantizer = switched(CPU.activation_quantizer(), observing=False)
    x = torch.tensor([0.123])
    assert torch.equal(quantizer(x), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_overflowing_batch_leaves_the_range_alone(bad):
    quantizer = switched(CPU.activation_quantizer())
    quantizer(torch.tensor([-1.0, 1.0]))
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(torch.tensor([bad, 100.0]))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


def test_a_live_weight_is_followed_in_eval_too_until_frozen():
    weight = torch.tensor([[1.27, 0.1], [0.0, 0.0]])
    quantizer = switched(CPU.weight_quantizer(weight)).eval()
    quantizer(weight)
    assert quantizer.scale.tolist() == pytest.approx([0.01, 1.0])
    quantizer(weight * 2)
    assert quantizer.scale.tolist() == pytest.approx([0.02, 1.0])
    switched(quantizer, observing=False)
    quantizer(weight * 4)
    assert quantizer.scale.tolist() == pytest.approx([0.02, 1.0])


def test_zeros_of_a_weight_stay_exactly_zero():
    weight = torch.randn(8, 16)
    mask = torch.rand(8, 16) > 0.7
    weight[~mask] = 0
    rounded = switched(CPU.weight_quantizer(weight))(weight)
    assert (rounded[~mask] == 0).all()
    assert torch.isfinite(rounded).all()


def test_inside_autocast_it_works_in_float32_and_gives_back_the_type_it_got():
    quantizer = switched(CPU.activation_quantizer())
    x = torch.linspace(-1, 1, 33, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantizer(x)
    assert y.dtype == torch.bfloat16
    assert quantizer.scale.dtype == torch.float32
    assert (y.float() - x.float()).abs().max() <= quantizer.scale / 2 + 2**-8


def test_state_goes_through_state_dict_deepcopy_and_pickle():
    quantizer = switched(CPU.activation_quantizer())
    quantizer(torch.tensor([-1.0, 3.0]))
    fresh = CPU.activation_quantizer()
    fresh.load_state_dict(quantizer.state_dict())
    x = torch.randn(50)
    copies = (fresh, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)))
    for other in copies:
        assert torch.equal(other.eval()(x), quantizer.eval()(x))


def test_a_dense_checkpoint_is_accepted_and_half_a_quantizer_is_not():
    quantizer = CPU.activation_quantizer()
    quantizer.load_state_dict({})
    with pytest.raises(RuntimeError, match="zero_point"):
        quantizer.load_state_dict({"scale": torch.tensor(1.0)})


# torch 2.11's own tracing of an autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_flipping_the_flags_compiles_nothing_again_and_computes_the_same():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer = CPU.activation_quantizer()

        def forward(self, x):
            return self.quantizer(x) * 2

    layer, twin = Layer(), Layer()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    torch.manual_seed(0)
    for enabled, observing in ((False, False), (True, False), (False, True), (True, True), (True, False)):
        switched(layer.quantizer, enabled=enabled, observing=observing)
        switched(twin.quantizer, enabled=enabled, observing=observing)
        x = torch.randn(64)
        assert torch.equal(compiled(x), twin(x))
    assert counter.frame_count == 1
    assert twin.quantizer.scale != 1
    assert torch.equal(layer.quantizer.scale, twin.quantizer.scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ranges_stay_float32_in_a_model_of_another_precision(dtype):
    quantizer = CPU.weight_quantizer(torch.randn(4, 8))
    quantizer.observing.fill_(True)
    quantizer.enabled.fill_(True)
    before = 1e-7 * torch.randn(4, 8)
    quantizer(before)
    expected = quantizer.scale.clone()
    module = torch.nn.Sequential(quantizer).to(dtype)
    assert torch.equal(quantizer.scale, expected)  # float16 would make it zero, and zeros NaN
    assert {buffer.dtype for buffer in quantizer.buffers()} == {torch.float32, torch.int32, torch.bool}
    assert bool(torch.isfinite(module(torch.zeros(4, 8, dtype=dtype))).all())
    assert module(torch.zeros(4, 8, dtype=dtype)).dtype == dtype


def test_a_quantizer_made_on_meta_gets_memory():
    quantizer = CPU.weight_quantizer(torch.randn(4, 8)).to("meta")
    assert quantizer.to_empty(device="cpu").scale.device.type == "cpu"
