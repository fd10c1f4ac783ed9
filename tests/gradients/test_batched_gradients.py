"""Several gradients at once: the mathematics against float64 autograd, one part at a time."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ovit_engine.gradients.batched import (
    Recorder,
    add_bias_gradients,
    add_conv_gradients,
    add_linear_gradients,
    batched_gradients,
    concatenated,
    record,
    split_outputs,
)

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    expected = expected.float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(float(expected.abs().max()), 1e-6))


def by_hand(layer: Any, x: Tensor, dy: Tensor, tensors: list[Tensor], count: int) -> list[Tensor]:
    """Float64 autograd on each run of rows alone: [count, *shape] for each tensor."""
    doubles = [tensor.double().requires_grad_() for tensor in tensors]
    found = [
        torch.autograd.grad(layer(part.double(), *doubles), doubles, above.double())
        for part, above in zip(x.chunk(count), dy.chunk(count), strict=True)
    ]
    return [torch.stack(grads) for grads in zip(*found, strict=True)]


@given(
    count=st.integers(1, 5),
    run=st.integers(1, 4),
    between=st.lists(st.integers(1, 3), max_size=2),
    width=st.integers(1, 7),
    out=st.integers(1, 6),
    beta=st.sampled_from([0.0, 1.0]),
)
@settings(deadline=None, max_examples=60)
def test_linear(count: int, run: int, between: list[int], width: int, out: int, beta: float) -> None:
    x, dy = seeded(count * run, *between, width), seeded(count * run, *between, out, seed=1)
    before = seeded(count, out, width, seed=2), seeded(count, out, seed=3)
    rows = [row.clone() if beta else torch.full_like(row, torch.nan) for row in before]
    add_linear_gradients(rows[0], x, dy, beta=beta)
    add_bias_gradients(rows[1], dy, dy.ndim - 1, beta=beta)
    expected = by_hand(F.linear, x, dy, [seeded(out, width), seeded(out)], count)
    for row, old, new in zip(rows, before, expected, strict=True):
        close(row, new + (old if beta else 0))


@st.composite
def convolutions(draw: Any) -> dict[str, Any]:
    dimensions = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = [draw(st.integers(1, 3)) for _ in range(dimensions)]
    dilation = draw(st.integers(1, 2))
    padding = draw(st.sampled_from([0, 1, 2, "same", "valid"]))
    return {
        "count": draw(st.integers(1, 3)),
        "run": draw(st.integers(1, 3)),
        "channels": groups * draw(st.integers(1, 2)),
        "out": groups * draw(st.integers(1, 2)),
        "kernel": kernel,
        "size": [draw(st.integers(5, 7)) for _ in range(dimensions)],
        "options": {
            "stride": 1 if padding == "same" else draw(st.integers(1, 2)),
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        },
    }


@given(case=convolutions(), beta=st.sampled_from([0.0, 1.0]))
@settings(deadline=None, max_examples=120)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_convolution(case: dict[str, Any], beta: float) -> None:
    options, groups, count = case["options"], case["options"]["groups"], case["count"]
    x = seeded(count * case["run"], case["channels"], *case["size"])
    weight, bias = seeded(case["out"], case["channels"] // groups, *case["kernel"]), seeded(case["out"])

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return CONVOLUTIONS[len(case["kernel"])](x, weight, bias, **options)  # type: ignore[operator,no-any-return]

    dy = seeded(*layer(x, weight, bias).shape, seed=1)
    before = seeded(count, *weight.shape, seed=2), seeded(count, case["out"], seed=3)
    rows = [row.clone() if beta else torch.full_like(row, torch.nan) for row in before]
    add_conv_gradients(rows[0], x, dy, beta=beta, **options)
    add_bias_gradients(rows[1], dy, 1, beta=beta)
    for row, old, new in zip(rows, before, by_hand(layer, x, dy, [weight, bias], count), strict=True):
        close(row, new + (old if beta else 0))


def both_ways(model: Any, inputs: list[Tensor], tensors: list[Tensor], loss: Any = torch.sum) -> None:
    """Batched gradients equal plain ones."""
    outputs, recorder = record(model, inputs, tensors)
    rows = [torch.empty(len(inputs), *tensor.shape) for tensor in tensors]
    assert batched_gradients([loss(output) for output in outputs], recorder, rows)
    for i, x in enumerate(inputs):
        for row, grad in zip(rows, torch.autograd.grad(loss(model(x)), tensors), strict=True):
            close(row[i], grad)


def weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [seeded(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


INPUTS = [seeded(2, 4, seed=10), seeded(2, 4, seed=11), seeded(2, 4, seed=12)]


def square(outputs: Tensor) -> Tensor:
    return outputs.square().mean()


def test_a_weight_used_twice_gets_the_sum() -> None:
    weight, bias = weights((4, 4), (4,))
    both_ways(lambda x: F.linear(F.linear(x, weight, bias).tanh(), weight, bias), INPUTS, [weight, bias], square)


def test_an_activation_in_place_leaves_the_gradient_of_the_layer_itself() -> None:
    """The output tensor becomes that of ReLU; the layer's own output gradient is what counts."""
    first, second = weights((4, 4), (3, 4))
    both_ways(lambda x: F.linear(F.linear(x, first).relu_(), second), INPUTS, [first, second], square)


def test_arguments_by_name_and_by_place() -> None:
    weight, bias, kernel = weights((4, 4), (4,), (2, 1, 3))

    def model(x: Tensor) -> Tensor:
        x = F.linear(weight=weight, input=x, bias=bias)
        return F.conv1d(x[:, None], kernel, None, 1, dilation=1, padding=1)

    both_ways(model, INPUTS, [weight, bias, kernel], square)


def test_a_loss_of_all_images_of_a_gradient() -> None:
    """It need not be a mean over images: each loss sees its own part alone."""
    (weight,) = weights((3, 4))
    both_ways(lambda x: F.linear(x, weight), INPUTS, [weight], lambda y: (y @ y.T).exp().sum())


def test_uses_that_are_not_seen_are_said() -> None:
    weight, other = weights((4, 4), (4, 4))
    outputs, recorder = record(lambda x: F.linear(x, weight) @ other, INPUTS, [weight, other])
    assert not batched_gradients([square(o) for o in outputs], recorder, [torch.empty(3, 4, 4) for _ in range(2)])
    with torch.no_grad():
        _, recorder = record(lambda x: F.linear(x, weight), INPUTS, [weight])
    assert not recorder.uses


def test_a_layer_whose_rows_cannot_be_shared_out() -> None:
    (weight,) = weights((3, 4))

    def model(x: Tensor) -> Tensor:
        return F.linear(x[1:], weight).sum() + x

    outputs, recorder = record(model, INPUTS, [weight])
    with pytest.raises(ValueError, match="rows of a layer can't be shared out"):
        batched_gradients([square(o) for o in outputs], recorder, [torch.empty(3, 3, 4)])


def test_the_trace_tells_other_functions_and_shapes_apart() -> None:
    (weight,) = weights((4, 4))

    def trace(model: Any, count: int = 3) -> Any:
        return record(model, INPUTS[:count], [weight])[1].trace

    plain = trace(lambda x: F.linear(x, weight).relu())
    assert plain == trace(lambda x: F.linear(x, weight).relu(), 2)  # whatever the number of gradients
    assert plain != trace(lambda x: F.linear(x, weight).tanh())
    assert plain != trace(lambda x: F.linear(x[3:], weight).relu().sum() * x)


def test_activations_are_counted_whichever_weights_make_them() -> None:
    with Recorder() as recorder:
        F.conv1d(F.linear(torch.ones(2, 4), torch.ones(6, 4))[:, None], torch.ones(3, 1, 3))
    assert recorder.activations == 2 * 6 + 2 * 3 * 4


def test_nested_inputs_and_outputs() -> None:
    batches = [{"a": torch.full((2, 3), float(i)), "b": (torch.full((2,), i),)} for i in range(3)]
    whole = concatenated(batches)
    assert whole["a"].shape == (6, 3)
    assert whole["b"][0].tolist() == [0, 0, 1, 1, 2, 2]
    parts = split_outputs((whole["a"], None, {"c": whole["b"][0]}), 6, 3)
    for part, batch in zip(parts, batches, strict=True):
        assert part[1] is None
        assert torch.equal(part[0], batch["a"])
        assert torch.equal(part[2]["c"], batch["b"][0])


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([torch.ones(2, 3), torch.ones(2, 4)], "differ in shape"),
        ([torch.ones(2, 3), (torch.ones(2, 3),)], "not alike"),
        ([(torch.ones(2), torch.ones(3)), (torch.ones(2), torch.ones(3))], "not alike"),
        (["text", "text"], "not made of tensors"),
        ([torch.tensor(1.0), torch.tensor(1.0)], "not made of tensors"),
        ([(), ()], "not made of tensors"),
    ],
)
def test_inputs_that_cannot_be_joined(batches: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        concatenated(batches)


@pytest.mark.parametrize("output", [torch.tensor(1.0), torch.ones(3, 4), (torch.ones(4, 2), torch.ones(2, 4))])
def test_outputs_that_cannot_be_parted(output: Any) -> None:
    with pytest.raises(ValueError, match="not a row for each image"):
        split_outputs(output, 4, 2)
