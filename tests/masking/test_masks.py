"""Masks: exact zeros by projection, and packed bits."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ovit_engine import Masks, Slot
from ovit_engine.masking.parameters import parameter_slots

CHECKERS = torch.tensor([[True, False], [False, True]])


def masked(weight: list[list[float]]) -> tuple[nn.Linear, Masks]:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor(weight)
    masks = Masks()
    masks.set(Slot("weight", layer, "weight"), CHECKERS)
    return layer, masks


def test_setting_a_mask_zeroes_the_weight() -> None:
    layer, masks = masked([[1.0, 2.0], [3.0, 4.0]])
    assert layer.weight.tolist() == [[1, 0], [0, 4]]
    assert layer.weight.requires_grad
    assert masks.names() == ["weight"]
    assert masks.changed


def test_projection_stops_nan_and_infinity_and_leaves_no_minus_zero() -> None:
    layer, masks = masked([[1.0, 1.0], [1.0, 1.0]])
    for bad in (math.nan, math.inf, -math.inf, -0.0, -3.0):
        layer.weight.data.fill_(bad)
        masks.project()
        pruned = layer.weight[~CHECKERS]
        assert bool((pruned == 0).all())
        assert not bool(torch.signbit(pruned).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("later", [torch.float16, torch.float64])
def test_masks_hold_in_every_precision_and_when_it_changes(dtype: torch.dtype, later: torch.dtype) -> None:
    layer = nn.Linear(2, 2, bias=False, dtype=dtype)
    masks = Masks()
    masks.set(Slot("weight", layer, "weight"), CHECKERS)
    for precision in (dtype, later):
        layer.to(precision)
        layer.weight.data = torch.tensor([[1.5, math.nan], [-math.inf, -2.5]], dtype=precision).T.contiguous().T
        masks.project()
        assert layer.weight.dtype == precision
        assert layer.weight.tolist() == [[1.5, 0], [0, -2.5]]
        assert not bool(torch.signbit(layer.weight[~CHECKERS]).any())


def test_kept_weights_are_not_touched() -> None:
    layer, masks = masked([[1.0, 2.0], [3.0, -0.0]])
    assert math.copysign(1, layer.weight[1, 1].item()) == -1
    before = layer.weight.data_ptr()
    masks.project()
    assert layer.weight.data_ptr() == before


def test_gradients_are_projected_only_when_asked() -> None:
    layer, masks = masked([[1.0, 2.0], [3.0, 4.0]])
    masks.project_gradients()  # no gradient yet
    layer.weight.grad = torch.full((2, 2), math.nan)
    masks.project()
    assert bool(layer.weight.grad.isnan().all())
    masks.project_gradients()
    assert layer.weight.grad[~CHECKERS].tolist() == [0, 0]


def test_the_share_of_zeros() -> None:
    assert Masks().sparsity() == 0.0
    _, masks = masked([[1.0, 2.0], [3.0, 4.0]])
    other = nn.Linear(2, 4, bias=False)
    masks.set(Slot("other", other, "weight"), torch.zeros(4, 2, dtype=torch.bool), "1:2")
    assert (masks.sparsity("weight"), masks.sparsity("other"), masks.sparsity()) == (0.5, 1.0, 10 / 12)
    assert (masks.pattern("weight"), masks.pattern("other")) == ("unstructured", "1:2")
    assert masks.get("none") is None


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(4, dtype=torch.bool), torch.ones(2, 3).bool()])
def test_a_mask_that_does_not_fit_is_named(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"mask of 'a.weight' must be boolean of shape \(2, 2\), not torch"):
        Masks().set(Slot("a.weight", nn.Linear(2, 2), "weight"), mask)


def test_the_mask_is_a_copy() -> None:
    layer, mask = nn.Linear(2, 2), CHECKERS.clone()
    masks = Masks()
    masks.set(Slot("weight", layer, "weight"), mask)
    mask.fill_(False)
    layer.weight.data.fill_(1.0)
    masks.project()
    assert layer.weight.tolist() == [[1, 0], [0, 1]]


def test_a_model_that_moves_after_attach_is_told() -> None:
    layer, masks = masked([[1.0, 2.0], [3.0, 4.0]])
    layer.to("meta")
    with pytest.raises(RuntimeError, match=r"'weight' moved from cpu to meta.*move the model first"):
        masks.project()


def test_a_copy_of_the_model_gets_the_same_zeros() -> None:
    layer, masks = masked([[1.0, 2.0], [3.0, 4.0]])
    twin = copy.deepcopy(layer)
    twin.weight.data.fill_(-1.0)
    masks.apply_to(nn.DataParallel(twin))
    assert twin.weight.tolist() == [[-1, 0], [0, -1]]
    with pytest.raises(ValueError, match="weight"):
        masks.apply_to(nn.ReLU())


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_packed_bits_come_back(shape: list[int], seed: int) -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.ones(shape))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    masks = Masks()
    masks.set(parameter_slots(layer)[0], mask, {"block": [1, 4]})
    file = io.BytesIO()
    torch.save(masks.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert state["weight"]["bits"].numel() == -(-mask.numel() // 8)
    layer.weight.data.fill_(1.0)
    again = Masks()
    again.load_state_dict(state, layer)
    again.project()
    found = again.get("weight")
    assert found is not None
    assert torch.equal(found, mask)
    assert again.pattern("weight") == {"block": [1, 4]}
    assert torch.equal(layer.weight != 0, mask)


def test_packed_bits_of_another_model_are_refused() -> None:
    state = masked([[1.0, 2.0], [3.0, 4.0]])[1].state_dict()
    with pytest.raises(ValueError, match="the checkpoint masks 'weight', which ReLU does not have"):
        Masks().load_state_dict(state, nn.ReLU())
    with pytest.raises(ValueError, match=r"the checkpoint's mask of 'weight' is \[2, 2\], the weight \[3, 2\]"):
        Masks().load_state_dict(state, nn.Linear(2, 3))


def test_loading_forgets_what_was_masked() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = (Slot(f"{i}.weight", model[i], "weight") for i in range(2))
    masks = Masks()
    masks.set(first, CHECKERS)
    other = Masks()
    other.set(second, CHECKERS)
    other.load_state_dict(masks.state_dict(), model)
    assert other.names() == ["0.weight"]
