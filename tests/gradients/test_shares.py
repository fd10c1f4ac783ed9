"""The sequence of gradients: the same whoever takes which part of it, with however many workers, and again."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from ovit_engine import Calibration
from ovit_engine.gradients import backward as gradient_pass
from ovit_engine.gradients.samples import Samples
from ovit_engine.masking.targets import find_slots

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


class Augmented(Dataset[Any]):
    """Draws from all three global generators, and notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.asked.append(index)
        noise = torch.rand(()) + float(np.random.rand()) + random.random()
        return X[index] + noise, index % 3


class AugmentedStream(IterableDataset[Any]):
    """Draws its order as it starts, and noise as it goes."""

    def __iter__(self) -> Iterator[Any]:
        return iter(map(self.item, random.sample(range(len(X)), len(X))))

    def item(self, index: int) -> tuple[Tensor, int]:
        return X[index] + torch.rand(()), index % 3


class SeededByWorker(Dataset[Any]):
    """Draws from a generator of its own, which each worker seeds as PyTorch recommends."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        info = get_worker_info()
        assert info is not None
        return X[index] * np.random.default_rng(info.seed).random(dtype=np.float32), index % 3


class StreamSeededByWorker(SeededByWorker, IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(X)))


def noisy_collate(items: list[Any]) -> Any:
    x, y = default_collate(items)
    return x * torch.rand(()), y


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def chunks(data: Any, share: tuple[int, int] = (0, 1), **options: Any) -> list[list[Tensor]]:
    net = model()
    settings = {"count": 21, "images_per_gradient": 4, "chunk": 5, "draw": 3, **options}
    found = Calibration(data, F.cross_entropy).gradients(
        net, find_slots(net, [r"re:.*weight"]), share=share, **settings
    )
    return [[part.clone() for part in chunk] for chunk in found]


def equal(found: list[list[Tensor]], expected: list[list[Tensor]]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.fixture(params=["batched", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "one by one":
        monkeypatch.setattr(gradient_pass, "ACTIVATIONS", 0)
    return str(request.param)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_shares_taken_in_turn_are_the_whole(way: str, ranks: int) -> None:
    whole = chunks(Augmented())
    assert [len(chunk[0]) for chunk in whole] == [5, 5, 5, 5, 1]
    parts = [chunks(Augmented(), (rank, ranks)) for rank in range(ranks)]
    assert [len(part) for part in parts] == [len(whole[rank::ranks]) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        assert equal(part, whole[rank::ranks])


def test_workers_change_nothing(way: str) -> None:
    whole = chunks(Augmented())
    for workers in (0, 2):
        loader = DataLoader(Augmented(), batch_size=3, num_workers=workers)
        for share in ((0, 1), (0, 2), (1, 2)):
            assert equal(chunks(loader, share), whole[share[0] :: share[1]])


def test_both_ways_see_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    batched = chunks(Augmented())
    monkeypatch.setattr(gradient_pass, "ACTIVATIONS", 0)
    for chunk, singles in zip(batched, chunks(Augmented()), strict=True):
        for rows, expected in zip(chunk, singles, strict=True):
            torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_what_was_drawn_before_changes_nothing_and_another_draw_does(way: str) -> None:
    data = Augmented()
    whole = chunks(data)
    torch.rand(5), np.random.rand(2), random.random()
    assert equal(chunks(data), whole)
    assert not equal(chunks(data, draw=4), whole)


def test_only_images_of_the_share_are_loaded_and_the_first_two_gradients() -> None:
    data = Augmented()
    chunks(data)
    order = data.asked
    assert len(order) == 21 * 4
    data = Augmented()
    chunks(data, (1, 2))
    batches = [order[i : i + 4] for i in range(0, len(order), 4)]
    expected = [*batches[:2], *batches[5:10], *batches[15:20]]
    assert data.asked == [index for batch in expected for index in batch]


def test_each_epoch_takes_each_image_at_most_once_in_an_order_of_its_own() -> None:
    data = Augmented()
    chunks(data, count=24)
    epochs = [data.asked[:48], data.asked[48:]]  # 50 images hold 12 batches of 4
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_a_share_of_nothing_loads_nothing() -> None:
    data = Augmented()
    assert chunks(data, (5, 6)) == []
    assert data.asked == []


@pytest.mark.parametrize("share", [(-1, 2), (2, 2), (0, 0)])
def test_a_share_that_is_none(share: tuple[int, int]) -> None:
    net = model()
    with pytest.raises(ValueError, match=r"share must be \(rank, ranks\) with 0 <= rank < ranks, not"):
        Calibration(Augmented(), F.cross_entropy).gradients(
            net, find_slots(net, ["0.weight"]), count=4, images_per_gradient=2, chunk=2, share=share
        )


def test_random_collation_belongs_to_the_batch(way: str) -> None:
    def loader(workers: int) -> DataLoader[Any]:
        return DataLoader(Augmented(), batch_size=4, collate_fn=noisy_collate, num_workers=workers)

    whole = chunks(loader(0))
    assert not equal(whole, chunks(Augmented()))
    assert equal(chunks(loader(2), (1, 2)), whole[1::2])


def test_a_stream_is_read_on_past_the_images_of_others(way: str) -> None:
    whole = chunks(AugmentedStream())
    assert equal(chunks(AugmentedStream()), whole)
    for rank in range(2):
        assert equal(chunks(AugmentedStream(), (rank, 2)), whole[rank::2])


@pytest.mark.parametrize("data", [SeededByWorker(), StreamSeededByWorker()])
@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_workers_are_seeded(data: Any) -> None:
    samples = Samples(data, 4, seed=1, options={"num_workers": 1})
    first = list(samples.batches(range(2)))
    torch.rand(1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(samples.batches(range(2)), first, strict=True))


def test_items_asked_for_together_are_given_together() -> None:
    class Together(Augmented):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            noise = torch.rand(())
            return [(X[index] + noise, index % 3) for index in indices]

    data = Together()
    whole = chunks(data)
    assert data.asked == []
    assert equal(chunks(Together(), (1, 2)), whole[1::2])


@pytest.mark.parametrize("data", [Augmented(), AugmentedStream()])
def test_batches_by_number(data: Any) -> None:
    """A batch is the same whichever others are asked for, epochs on."""
    samples = Samples(data, 4, seed=1, options={})
    whole = list(samples.batches(range(30)))
    assert len(whole) == 30
    found = list(samples.batches([2, 29, 13]))
    assert all(torch.equal(a[0], whole[n][0]) for a, n in zip(found, (2, 13, 29), strict=True))
    assert not any(torch.equal(whole[0][0], batch[0]) for batch in whole[1:])  # 12 or 13 batches an epoch
    assert list(samples.batches([])) == []
