"""The contract of `prune_tensors` and `prune_streamed`: arguments, errors, streams, types, inputs left alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import random_problem, zeros
from torch import Tensor

from ovit_engine.pruning import METHODS, Pruned, prune_streamed, prune_tensors
from ovit_engine.pruning.patterns import NM
from tests.devices import ACCELERATOR


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "obirt"}, "method must be one of ovit, obert, obd, mfac, grad_weight, magnitude, is 'obirt'"),
        ({"scope": "row"}, "scope must be one of global, layer, erk, is 'row'"),
        ({"rule": "hull"}, "rule must be one of cumulative, marginal, is 'hull'"),
        ({"update": "independent"}, "update must be one of joint, none, is 'independent'"),
        ({"sparsity": 1.2}, r"between 0 and 1, is 1\.2"),
        ({"sparsity": None}, "unstructured needs a sparsity"),
        ({"pattern": 124}, "unquoted 2:4"),
        ({"block": 0}, "block must be between 1 and 32767, is 0"),
        ({"damp": 0.0}, r"damp must be positive and finite, is 0\.0"),
        ({"damp": float("nan")}, "damp must be positive"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.float64"),
        ({"pattern": "2:4", "sparsity": None, "block": 2}, "block 2 is smaller"),
        ({"masks": [torch.ones(2, 8)]}, r"weights\[0\]: a mask must be boolean of shape \(2, 8\)"),
        ({"masks": []}, "1 weights but 0 masks"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    weights, gradients = random_problem((2, 8))
    with pytest.raises(ValueError, match=words):
        prune_tensors(weights, gradients, **{"sparsity": 0.5, **options})


def test_tensors_that_make_no_sense() -> None:
    weights, gradients = random_problem((2, 8))
    with pytest.raises(ValueError, match="no weights"):
        prune_tensors([], [], sparsity=0.5)
    with pytest.raises(ValueError, match=r"weights\[0\]: no elements"):
        prune_tensors([torch.ones(0, 3)], [torch.ones(2, 0, 3)], sparsity=0.5)
    with pytest.raises(ValueError, match=r"floating point \(16 bits or more\), are torch\.int64"):
        prune_tensors([torch.ones(3, dtype=torch.int64)], None, sparsity=0.5, method="magnitude")
    with pytest.raises(ValueError, match=r"must have shape \(20, 2, 8\), have \(20, 8, 2\)"):
        prune_tensors(weights, [gradients[0].mT], sparsity=0.5)
    with pytest.raises(ValueError, match="1 weights but 2 gradients"):
        prune_tensors(weights, gradients * 2, sparsity=0.5)
    with pytest.raises(ValueError, match="ovit needs gradients"):
        prune_tensors(weights, None, sparsity=0.5)
    with pytest.raises(ValueError, match="obd needs gradients, and there are none"):
        prune_tensors(weights, [gradients[0][:0]], sparsity=0.5, method="obd")
    with pytest.raises(ValueError, match="1 weights but 2 names"):
        prune_streamed(weights, [gradients], 20, names=["a", "b"], sparsity=0.5)


WEIGHT, STACK = torch.ones(2, 8), torch.ones(3, 2, 8)
ODD: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": "0.5"}, "sparsity must be a number between 0 and 1, is '0.5'"),
    ({"sparsity": True}, "sparsity must be a number between 0 and 1, is True"),
    ({"sparsity": torch.tensor(0.5)}, r"sparsity must be a number between 0 and 1, is tensor\(0\.5"),
    ({"block": 8.0}, r"block must be a whole number, is 8\.0"),
    ({"block": None}, "block must be a whole number, is None"),
    ({"damp": "1e-6"}, "damp must be a number, is '1e-6'"),
    ({"weights": WEIGHT}, "weights must be a list of tensors, are a Tensor"),
    ({"weights": {"fc": WEIGHT}}, "weights must be a list of tensors, are a dict"),
    ({"weights": [WEIGHT.numpy()]}, r"weights\[0\] must be a tensor, is a ndarray"),
    ({"gradients": STACK}, "gradients must be a list of tensors, are a Tensor"),
    ({"gradients": iter([STACK])}, "gradients must be a list of tensors, are a list_iterator"),
    ({"gradients": [STACK.int()]}, r"gradients\[0\] must be floating point, are torch\.int32"),
    ({"gradients": [STACK.to(torch.complex64)]}, r"gradients\[0\] must be floating point, are torch\.complex64"),
    ({"gradients": [torch.tensor(1.0)]}, r"gradients\[0\] must be stacked as \[N, \*shape of the weight\]"),
    ({"masks": WEIGHT > 0}, "masks must be a list of tensors, are a Tensor"),
    ({"masks": [(WEIGHT > 0).numpy()]}, r"masks\[0\] must be a tensor, is a ndarray"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("options", "words"), ODD, ids=lambda value: value if isinstance(value, str) else "")
def test_odd_types_are_named(method: str, options: dict[str, Any], words: str) -> None:
    given = {"weights": [WEIGHT], "gradients": [STACK], "sparsity": 0.5, "method": method, **options}
    with pytest.raises(TypeError, match=f"^{words}"):
        prune_tensors(given.pop("weights"), given.pop("gradients"), **given)


def test_odd_chunks_and_weights_are_named() -> None:
    with pytest.raises(TypeError, match=r"gradients\[0\] must be floating point, are torch\.int64"):
        prune_streamed([WEIGHT], [[STACK.long()]], 3, sparsity=0.5)
    for weight in (WEIGHT.to_sparse(), WEIGHT.to("meta")):
        with pytest.raises(ValueError, match=r"weights\[0\]: weights must be dense tensors with values, not torch\."):
            prune_tensors([weight], [STACK], sparsity=0.5)
    with pytest.raises(ValueError, match=r"16 bits or more\), are torch\.float8_e4m3fn"):
        prune_tensors([WEIGHT.to(torch.float8_e4m3fn)], None, method="magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match=r"method must be one of .*, is \['ovit'\]"):
        prune_tensors([WEIGHT], [STACK], sparsity=0.5, method=["ovit"])  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [19, 21])
def test_gradients_are_counted(count: int) -> None:
    weights, gradients = random_problem((2, 8))
    with pytest.raises(ValueError, match=f"{count} gradients were announced, 20 came"):
        prune_streamed(weights, zip(*(g.split(5) for g in gradients), strict=True), count, sparsity=0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", NM(2, 4), {"block": [1, 4]}])
def test_inputs_are_left_alone(method: str, pattern: Any) -> None:
    weights, gradients = random_problem((4, 8), count=1)
    parameter = torch.nn.Parameter(weights[0].clone())
    mask = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) > 0.2
    before = gradients[0].clone(), mask.clone()
    masks, updated = prune_tensors(
        [parameter], gradients, masks=[mask], method=method, pattern=pattern, sparsity=0.5, block=32
    )
    assert parameter.detach().equal(weights[0])
    assert gradients[0].equal(before[0])
    assert mask.equal(before[1])
    assert not updated[0].requires_grad
    assert masks[0].data_ptr() != mask.data_ptr()
    same_masks, same = prune_tensors([parameter], gradients, masks=[mask], method=method, sparsity=0.0)
    same[0].zero_()
    same_masks[0].zero_()
    assert parameter.detach().equal(weights[0])
    assert mask.equal(before[1])


def test_gradients_may_be_computed_on_demand_and_in_one_buffer() -> None:
    """The stream runs with autograd, and its memory may be used again for every chunk."""
    torch.manual_seed(0)
    options: Any = {"sparsity": 0.5, "block": 8, "dtype": torch.float64}
    layer = torch.nn.Linear(8, 4, bias=False)
    inputs = torch.randn(20, 8)
    buffer = torch.empty(3, 4, 8)

    def stream() -> Iterator[list[Tensor]]:
        for few in inputs.split(3):
            for row, sample in enumerate(few):
                (buffer[row],) = torch.autograd.grad(layer(sample).square().sum(), [layer.weight])
            yield [buffer[: len(few)]]
            buffer.fill_(float("nan"))

    streamed = prune_streamed([layer.weight], stream(), 20, **options)
    stack = torch.stack([torch.autograd.grad(layer(x).square().sum(), [layer.weight])[0] for x in inputs])
    masks, updated = prune_tensors([layer.weight], [stack], **options)
    assert isinstance(streamed, Pruned)
    assert streamed.masks[0].equal(masks[0])
    torch.testing.assert_close(streamed.weights[0], updated[0], rtol=1e-4, atol=1e-4)


def test_nothing_is_asked_of_the_stream_when_there_is_nothing_to_do() -> None:
    def never() -> Iterator[list[Tensor]]:
        raise AssertionError
        yield []

    weights, _ = random_problem((2, 8))
    assert zeros(prune_streamed(weights, never(), 20, sparsity=0.0).masks) == 0
    assert zeros(prune_streamed(weights, never(), 20, sparsity=0.5, method="magnitude").masks) == 8


def test_without_update_survivors_stay() -> None:
    weights, gradients = random_problem((4, 8))
    masks, joint = prune_tensors(weights, gradients, sparsity=0.5, block=8)
    same, plain = prune_tensors(weights, gradients, sparsity=0.5, block=8, update="none")
    assert same[0].equal(masks[0])
    assert plain[0].equal(weights[0] * masks[0])
    assert not joint[0].equal(plain[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_floating_types_come_back_as_they_were(dtype: torch.dtype, method: str) -> None:
    weights, gradients = random_problem((4, 8), (3, 3), (5,), ())
    weights, gradients = [w.to(dtype) for w in weights], [g.to(dtype) for g in gradients]
    masks, updated = prune_tensors(weights, gradients, method=method, sparsity=0.5, block=8, damp=1e-2)
    assert all(new.dtype == dtype and new.shape == old.shape for new, old in zip(updated, weights, strict=True))
    assert all(new.is_contiguous() for new in updated)
    assert zeros(masks) == round(0.5 * 47)


def test_global_defaults_of_torch_do_not_leak_in() -> None:
    weights, gradients = random_problem((4, 8), dtype=torch.float32)
    expected = prune_tensors(weights, gradients, sparsity=0.5, pattern={"block": [1, 4]})
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        got = prune_tensors(weights, gradients, sparsity=0.5, pattern={"block": [1, 4]})
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert got[0][0].equal(expected[0][0])
    assert got[1][0].equal(expected[1][0])


def test_strided_inputs() -> None:
    weights, gradients = random_problem((8, 4), (4, 8, 3, 3), dtype=torch.float32)
    turned = [weights[0].mT, weights[1].to(memory_format=torch.channels_last)]
    stacks = [gradients[0].mT, gradients[1]]
    plain = [weights[0].mT.contiguous(), weights[1]]
    one = prune_tensors(turned, stacks, sparsity=0.5, block=8)
    other = prune_tensors(plain, [stacks[0].contiguous(), stacks[1]], sparsity=0.5, block=8)
    assert all(a.equal(b) for a, b in zip(one[0] + one[1], other[0] + other[1], strict=True))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_magnitude_is_a_sort(scope: str) -> None:
    weights = [torch.tensor([0.5, -0.1, 0.3, 0.2]), torch.tensor([[5.0, -4.0], [3.0, 0.05]])]
    masks, updated = prune_tensors(weights, None, method="magnitude", sparsity=0.5, scope=scope)
    if scope == "global":
        assert masks[0].tolist() == [True, False, False, False]
        assert masks[1].tolist() == [[True, True], [True, False]]
    else:
        assert masks[0].tolist() == [True, False, True, False]
        assert masks[1].tolist() == [[True, True], [False, False]]
    assert all(new.equal(old * mask) for new, old, mask in zip(updated, weights, masks, strict=True))


def test_magnitude_reports_half_the_squared_length() -> None:
    pruned = prune_streamed([torch.tensor([2.0, 1.0, 3.0, 5.0])], (), 0, method="magnitude", sparsity=0.5)
    assert pruned.errors == [2.5]


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options", [{"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": {"block": [1, 4]}, "sparsity": 0.5}]
)
def test_a_gpu_gives_what_the_cpu_gives(options: dict[str, Any], method: str) -> None:
    weights, gradients = random_problem((16, 32), (8, 16, 3, 3), count=30)
    options = {"block": 32, "damp": 1e-3, "dtype": torch.float64, "method": method, **options}
    expected = prune_tensors(weights, gradients, **options)
    for moved in (gradients, [gradient.to(ACCELERATOR) for gradient in gradients]):
        there = [weight.to(ACCELERATOR) for weight in weights]
        got = prune_tensors(there, moved, **options)
        assert all(mask.device.type == ACCELERATOR for mask in got[0])
        for index in range(2):
            assert got[0][index].cpu().equal(expected[0][index])
            torch.testing.assert_close(got[1][index].cpu(), expected[1][index], rtol=1e-8, atol=1e-9)


@pytest.mark.gpu
def test_autocast_of_a_gpu_rounds_nothing() -> None:
    weights, gradients = random_problem((16, 32), count=30, dtype=torch.float32)
    there = [weight.to(ACCELERATOR) for weight in weights], [gradient.to(ACCELERATOR) for gradient in gradients]
    plain = prune_tensors(*there, sparsity=0.5, block=16)
    with torch.autocast(ACCELERATOR, torch.float16):
        got = prune_tensors(*there, sparsity=0.5, block=16)
    assert got[0][0].equal(plain[0][0])
    assert got[1][0].equal(plain[1][0])
