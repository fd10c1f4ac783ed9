"""Which images each calibration gradient takes: a function of the seed and of the gradient's number alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ovit_engine.utils.random_states import mixed, seed_everything


class Samples:
    """Batches by number. Batch 7 holds the same images in the same random augmentation whoever asks for it.

    So a rank may load its own batches only, and neither the number of loader workers nor what was loaded before
    changes anything. A dataset that draws from a generator of its own, rather than from Python's, NumPy's or torch's
    global one, is beyond reach. So is the order of a stream (IterableDataset): it is read from its start past the
    batches that were not asked for, and is what its workers make it.

    Args:
        dataset: of single images.
        images: images a batch; a smaller dataset is one batch.
        seed: of the order of images and of their augmentation.
        options: of the DataLoader: collate_fn, num_workers and the like.
    """

    def __init__(self, dataset: Dataset[Any], images: int, *, seed: int, options: dict[str, Any]) -> None:
        self.dataset, self.images, self.seed, self.options = dataset, images, seed, options

    def batches(self, numbers: Sequence[int]) -> Iterator[Any]:
        """Return the collated batches called for, in increasing order of their numbers.

        Raises:
            ValueError: the dataset is a stream and yields nothing.
        """
        if isinstance(self.dataset, IterableDataset):
            return self._streamed(self.dataset, set(numbers))
        generator = torch.Generator().manual_seed(self.seed)  # a loader without one draws a seed from the global state
        loader: DataLoader[Any] = DataLoader(
            _SeededBatches(self.dataset, self.seed),
            batch_sampler=self._indices(sorted(numbers)),  # type: ignore[arg-type]
            generator=generator,
            **self.options,
        )
        return _iterate_on_cpu(loader)

    def _indices(self, numbers: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Return (number, indices) of each batch: a new order of images each epoch, without what is left over.

        Whole batches only: a gradient of fewer images has another scale, which damping would feel.
        """
        count = len(self.dataset)  # type: ignore[arg-type]
        images = min(self.images, count)
        found, order, drawn = [], torch.empty(0, device="cpu"), -1
        for number in numbers:
            epoch, place = divmod(number, count // images)
            if epoch != drawn:
                generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
                order = torch.randperm(count, generator=generator, device="cpu")
                drawn = epoch
            found.append((number, order[place * images : (place + 1) * images].tolist()))
        return found

    def _streamed(self, dataset: IterableDataset[Any], numbers: set[int]) -> Iterator[Any]:
        number, epoch = 0, 0
        while number <= max(numbers, default=-1):
            stream, before = _SeededStream(dataset, self.images, mixed(self.seed, epoch)), number
            generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
            for batch in _iterate_on_cpu(
                DataLoader(stream, batch_size=self.images, generator=generator, **self.options)
            ):
                if number in numbers:
                    yield batch
                number += 1
            if number == before:
                raise ValueError("the calibration dataset yields no batch")
            epoch += 1


def _iterate_on_cpu(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader that draws on the CPU, also where `torch.set_default_device` names another device."""
    with torch.device("cpu"):
        return iter(loader)


class _SeededBatches(Dataset[Any]):
    """A dataset asked by (number, indices), which seeds each batch by its number."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, batch: tuple[int, list[int]]) -> list[Any]:
        number, indices = batch
        seed_everything(mixed(self.seed, 0, number))
        many = getattr(self.dataset, "__getitems__", None)
        if many is not None:
            return list(many(indices))
        return [self.dataset[index] for index in indices]


class _SeededStream(IterableDataset[Any]):
    """A stream whose random draws are those of its epoch, worker and place."""

    def __init__(self, dataset: IterableDataset[Any], images: int, seed: int) -> None:
        self.dataset, self.images, self.seed = dataset, images, seed

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        seed = mixed(self.seed, 0 if info is None else info.id)
        seed_everything(seed)
        source = iter(self.dataset)
        while True:
            for place in range(self.images):
                if place == 0:
                    seed = mixed(seed)
                    seed_everything(seed)
                try:
                    item = next(source)
                except StopIteration:
                    return
                yield item
