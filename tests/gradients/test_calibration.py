"""Calibration: right gradients, and nothing else in the world moves."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ovit_engine import Calibration, Slot
from ovit_engine.masking.parameters import parameter_slots
from ovit_engine.masking.targets import find_slots

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(X, Y)
mse = nn.functional.mse_loss


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def weight_of(model: nn.Module) -> list[Slot]:
    return find_slots(model, [parameter_slots(model)[0].name])


def collect(
    calibration: Calibration, model: nn.Module, slots: list[Slot] | None = None, **options: Any
) -> list[Tensor]:
    """All gradients of each slot, [count, *shape]."""
    slots = slots or weight_of(model)
    settings = {"count": 6, "images_per_gradient": 4, "chunk": 4, **options}
    chunks = [[part.clone() for part in chunk] for chunk in calibration.gradients(model, slots, **settings)]
    return [torch.cat([chunk[i] for chunk in chunks]) for i in range(len(slots))]


class Loud(DataLoader[Any]):
    """A loader that must not be iterated: its persistent workers would start again."""

    def __iter__(self) -> Any:
        raise AssertionError("the user's loader was iterated")


class Numbered(Dataset[Any]):
    """Items that say which they are."""

    def __init__(self, count: int = 40) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= self.count:
            raise IndexError(index)
        return X[index], index


@pytest.mark.parametrize("wrong", ["count", "images_per_gradient", "chunk"])
def test_numbers_below_one_are_refused(wrong: str) -> None:
    model = nn.Linear(2, 1)
    data = torch.utils.data.TensorDataset(torch.randn(8, 2), torch.randn(8, 1))
    numbers = {"count": 2, "images_per_gradient": 2, "chunk": 2, wrong: 0}
    with pytest.raises(ValueError, match=f"{wrong} must be at least 1, not 0"):
        Calibration(data, nn.functional.mse_loss).gradients(model, parameter_slots(model), **numbers)


def test_gradients_of_16_images_are_their_mean_by_hand() -> None:
    model, seen = linear(), []

    def loss(outputs: Tensor, indices: Tensor) -> Tensor:
        seen.append(indices.tolist())
        return mse(outputs, Y[indices])

    weight, bias = collect(
        Calibration(Numbered(), loss), model, parameter_slots(model), count=5, images_per_gradient=16
    )
    assert [len(indices) for indices in seen] == [16] * 5
    for row, indices in enumerate(seen):
        x, y = X[indices].double(), Y[indices].double()
        residual = x @ model.weight.double().T + model.bias.double() - y
        expected = 2 * residual.T @ x / residual.numel()
        torch.testing.assert_close(weight[row].double(), expected.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(bias[row].double(), 2 * residual.sum(0).detach() / residual.numel())


def test_images_are_drawn_without_repetition_in_whole_batches() -> None:
    seen: list[int] = []

    def loss(outputs: Tensor, indices: Tensor) -> Tensor:
        assert len(indices) == 4
        seen.extend(indices.tolist())
        return outputs.sum()

    collect(Calibration(Numbered(10), loss), linear(), count=4)  # 10 images hold two batches of 4
    assert len(set(seen[:8])) == len(set(seen[8:])) == 8
    assert seen[:8] != seen[8:]
    assert sorted(seen[:8]) != seen[:8]


def test_a_dataset_smaller_than_a_batch_is_one_batch() -> None:
    sizes: list[int] = []

    def loss(outputs: Tensor, indices: Tensor) -> Tensor:
        sizes.append(len(indices))
        return outputs.sum()

    collect(Calibration(Numbered(5), loss), linear(), count=3, images_per_gradient=16)
    assert sizes == [5, 5, 5]


@pytest.mark.parametrize("chunk", [1, 3, 6, 50])
def test_chunks_change_nothing(chunk: int) -> None:
    calibration, model = Calibration(DATA, mse), linear()
    chunks = [
        len(part)
        for (part,) in calibration.gradients(model, weight_of(model), count=6, images_per_gradient=4, chunk=chunk)
    ]
    assert chunks == {1: [1] * 6, 3: [3, 3], 6: [6], 50: [6]}[chunk]
    assert torch.equal(collect(calibration, model, chunk=chunk)[0], collect(calibration, model, chunk=4)[0])


def test_chunks_share_their_memory() -> None:
    model = linear()
    chunks = Calibration(DATA, mse).gradients(model, weight_of(model), count=6, images_per_gradient=4, chunk=2)
    assert len({part.data_ptr() for (part,) in chunks}) == 1


def test_the_loader_is_not_iterated_but_its_collate_is_used() -> None:
    def collate(items: list[Any]) -> tuple[Tensor, Tensor]:
        return 2 * torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])

    model = linear()
    loader = Loud(DATA, batch_size=7, collate_fn=collate)
    doubled = TensorDataset(2 * X, Y)
    assert torch.equal(collect(Calibration(loader, mse), model)[0], collect(Calibration(doubled, mse), model)[0])


def test_one_seed_gives_the_same_gradients_whatever_happened_before() -> None:
    model = nn.Sequential(linear(), nn.Dropout(0.5))

    def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
        noise = torch.rand(()) + float(np.random.rand()) + random.random()
        return mse(outputs, targets) * noise

    first = collect(Calibration(DATA, noisy), model)[0]
    torch.rand(3), np.random.rand(3), random.random()
    model.train()
    assert torch.equal(collect(Calibration(DATA, noisy), model)[0], first)
    assert not torch.equal(collect(Calibration(DATA, noisy, seed=1), model)[0], first)
    assert not torch.equal(collect(Calibration(DATA, noisy), model, draw=1)[0], first)


class Busy(nn.Module):
    """Norms in both modes, a frozen weight, dropout, and a buffer that its forward replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm, self.still = nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval()
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 2).requires_grad_(False)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("inside", torch.zeros(()))
        self.train()
        self.still.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.inside += 1
        self.norm.running_mean += 1  # type: ignore[operator]
        return self.last(self.drop(self.still(self.norm(self.first(x)))))  # type: ignore[no-any-return]


def snapshot(model: nn.Module) -> list[Any]:
    numpy_state: Any = np.random.get_state()
    return [
        [module.training for module in model.modules()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [(p.data_ptr(), p.tolist()) for p in model.parameters()],
        [(name, id(buffer), buffer.tolist()) for name, buffer in model.named_buffers()],
        torch.get_rng_state().tolist(),
        (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
        random.getstate(),
        torch.is_grad_enabled(),
    ]


def busy() -> Busy:
    torch.manual_seed(0)
    model = Busy()
    model(X).sum().backward()
    return model


def noisy_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return mse(outputs, targets) + torch.rand(()) + float(np.random.rand()) + random.random()


def test_between_chunks_and_afterwards_everything_is_as_before() -> None:
    model = busy()
    slots = find_slots(model, ["first.weight", "last.weight"])
    before = snapshot(model)
    with torch.no_grad():
        before_inside = snapshot(model)
        for chunk in Calibration(DATA, noisy_mse).gradients(model, slots, count=5, images_per_gradient=4, chunk=2):
            assert all(bool((part != 0).any()) for part in chunk)
            assert not any(part.requires_grad for part in chunk)
            assert snapshot(model) == before_inside
    assert snapshot(model) == before


def failing(after: int) -> Callable[[Tensor, Tensor], Tensor]:
    calls = iter(range(100))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if next(calls) == after:
            raise KeyError("mine")
        return noisy_mse(outputs, targets)

    return loss


def test_when_an_exception_flies_everything_is_as_before() -> None:
    model = busy()
    before = snapshot(model)
    with pytest.raises(KeyError, match="mine"):
        collect(Calibration(DATA, failing(after=3)), model, find_slots(model, ["first.weight", "last.weight"]))
    assert snapshot(model) == before


def test_when_the_reader_stops_early_everything_is_as_before() -> None:
    model = busy()
    before = snapshot(model)
    chunks = Calibration(DATA, mse).gradients(
        model, find_slots(model, ["last.weight"]), count=5, images_per_gradient=4, chunk=2
    )
    next(iter(chunks))
    assert snapshot(model) == before
    del chunks
    assert snapshot(model) == before


def test_a_frozen_weight_has_gradients_too() -> None:
    model, free = linear(), linear()
    model.weight.requires_grad_(False)
    assert torch.equal(collect(Calibration(DATA, mse), model)[0], collect(Calibration(DATA, mse), free)[0])
    assert not model.weight.requires_grad


def test_the_model_runs_in_eval_mode_without_autocast() -> None:
    model = linear()
    modes = []
    model.register_forward_hook(lambda m, _, out: modes.append((m.training, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        collect(Calibration(DATA, mse), model, count=1)
    assert modes == [(False, torch.float32)]


class Stream(IterableDataset[Any]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        yield from zip(X[: self.length], Y[: self.length], strict=True)


def test_a_stream_is_read_again_when_it_ends() -> None:
    model = linear()
    (found,) = collect(Calibration(Stream(8), mse), model, count=5)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
    expected = torch.autograd.grad(mse(model(X[:4]), Y[:4]), [model.weight])[0]
    torch.testing.assert_close(found[0], expected)


def test_a_stream_with_nothing_in_it() -> None:
    with pytest.raises(ValueError, match="the calibration dataset yields no batch"):
        collect(Calibration(Stream(0), mse), linear())


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (TensorDataset(torch.ones(0, 3)), ValueError, "the calibration dataset is empty"),
        ((x for x in X), TypeError, "calibration needs a DataLoader or a Dataset.*not generator"),
        (DataLoader(TensorDataset(X[None], Y[None]), batch_size=None), (TypeError, ValueError), "batch"),
    ],
)
def test_data_that_is_none(data: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Calibration(data, mse)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (nn.MSELoss(reduction="none"), "mean loss"),
        (lambda outputs, targets: 3.0, "mean loss"),
        (lambda outputs, targets: (outputs - targets).detach().mean(), "the calibration loss does not depend on"),
    ],
)
def test_what_is_no_loss_is_said(loss: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        collect(Calibration(DATA, loss), linear())


def test_a_batch_without_targets_is_refused() -> None:
    with pytest.raises(TypeError, match=r"hold no targets: give \(inputs, targets\), or a mapping with labels"):
        collect(Calibration([{"x": X[0]}] * 8, mse), linear())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be \(inputs, targets\) or a mapping, not Tensor"):
        collect(Calibration(X, mse), linear())  # type: ignore[arg-type]


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return (x + 2 * z) @ self.weight.T


class TwoInputs(Dataset[Any]):
    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        self.form = form

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return self.form(X[index], X[index].flip(0), Y[index])


@pytest.mark.parametrize(
    "form",
    [
        lambda x, z, y: ((x, z), y),
        lambda x, z, y: (x, z, y),
        lambda x, z, y: {"z": z, "x": x, "labels": y},
        lambda x, z, y: ({"z": z, "x": x}, y),
    ],
    ids=["nested", "flat", "mapping", "named"],
)
@pytest.mark.parametrize("count", [4, 32])
def test_gradients_of_several_inputs_in_every_form(form: Callable[..., Any], count: int) -> None:
    model, z = Sums(), X.flip(1)
    (found,) = collect(Calibration(TwoInputs(form), mse), model, count=count, images_per_gradient=40)
    with torch.no_grad():
        inputs = X + 2 * z
        expected = 2 * (inputs @ model.weight.T - Y).T @ inputs / Y.numel()
    torch.testing.assert_close(found, expected.expand(count, 2, 3), rtol=1e-4, atol=1e-6)


def test_one_input_by_a_name_of_the_data() -> None:
    class Named(TwoInputs):
        def __getitem__(self, index: int) -> Any:
            return {"pixel_values": X[index], "labels": Y[index]}

    (named,) = collect(Calibration(Named(lambda x, z, y: x), mse), linear())
    (paired,) = collect(Calibration(DATA, mse), linear())
    assert torch.equal(named, paired)


@pytest.mark.parametrize("count", [8, 32])
def test_a_batch_whose_loss_is_no_number_is_named(count: int) -> None:
    labels = torch.arange(40) % 2
    labels[8:12] = -100  # gradient 2 of 4 images each, where nothing is shuffled

    class Ordered(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(zip(X, labels, strict=True))

    with pytest.raises(ValueError, match=r"calibration batch 2 \(from 0\): the loss is nan"):
        collect(Calibration(Ordered(), nn.functional.cross_entropy), linear(), count=count)


def test_gradients_that_are_all_zero_are_told(caplog: pytest.LogCaptureFixture) -> None:
    (found,) = collect(Calibration(DATA, lambda outputs, targets: outputs.sum() * 0), linear(), count=8)
    assert not found.any()
    assert "all 8 calibration gradients are zero" in caplog.text


def test_a_slot_that_the_loss_does_not_depend_on_is_named() -> None:
    model = busy()
    model.spare = nn.Linear(2, 2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"does not depend on 'spare\.weight': leave it out of the targets"):
        collect(Calibration(DATA, mse), model, find_slots(model, ["first.weight", "spare.weight"]))
    assert snapshot(model) == before


def test_the_subset_that_a_sampler_draws_from_is_kept() -> None:
    """A split by SubsetRandomSampler must not leak validation images into pruning."""
    seen: set[int] = set()

    def loss(outputs: Tensor, indices: Tensor) -> Tensor:
        seen.update(indices.tolist())
        return outputs.sum()

    loader = DataLoader(Numbered(), batch_size=4, sampler=torch.utils.data.SubsetRandomSampler(range(8, 16)))
    collect(Calibration(loader, loss), linear(), count=8)
    assert seen == set(range(8, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_come_in_the_type_of_the_weights(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 3).to(dtype)
    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randint(3, (8,)))
    calibration = Calibration(data, nn.functional.cross_entropy)
    (chunk,) = calibration.gradients(model, find_slots(model, ["weight"]), count=2, images_per_gradient=4, chunk=2)
    assert chunk[0].dtype == torch.float32
    assert bool(chunk[0].abs().sum() > 0)
