"""Which images each step of the bundled trainer takes, and in which augmentation: a function of seed, epoch and place.

So training goes on within an epoch without any state but the step, neither workers nor processes change a batch, and
what is drawn for images never moves the random numbers of the model.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ovit_engine.core.training_options import Training
from ovit_engine.distributed.comm import Comm
from ovit_engine.training.images import UnreadableImageError
from ovit_engine.utils.random_states import mixed, seed_cpu

Key = tuple[int, int]  # the seed of an image's augmentation, and the image's index


class TrainingBatches(Sampler[list[Key]]):
    """The keys of what goes through the model at a time, for `SeededItems`; those of one process of several.

    A batch is that of all processes together: place p of an epoch goes to process p modulo their count.

    Args:
        images: of the dataset, each drawn once an epoch, without what is left over.
        part: images that go through the model of one process at a time.
        accumulate: such parts an optimizer step.
        repeats: times that each image drawn comes in a row; an epoch has as many images as without.
    """

    def __init__(self, images: int, part: int, *, accumulate: int, repeats: int, seed: int, comm: Comm) -> None:
        self.steps = images // (part * comm.count * accumulate)
        self._images, self._part, self._accumulate, self._repeats = images, part, accumulate, repeats
        self._seed, self._comm = seed, comm
        self._epoch = self._first = 0

    def go_to(self, epoch: int, step: int) -> None:
        """Let the next iteration begin at a step of an epoch; both count from 0."""
        self._epoch, self._first = epoch, step * self._accumulate

    def __len__(self) -> int:
        return self.steps * self._accumulate - self._first

    def __iter__(self) -> Iterator[list[Key]]:
        order, count = self._order(), self._comm.count
        whole = self._part * count
        for number in range(self._first, self.steps * self._accumulate):
            places = range(number * whole + self._comm.rank, (number + 1) * whole, count)
            yield [(mixed(self._seed, self._epoch, place), order[place]) for place in places]

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(mixed(self._seed, self._epoch))
        order = torch.randperm(self._images, generator=generator)
        return order.repeat_interleave(self._repeats)[: self._images].tolist()


class SeededItems(Dataset[Any]):
    """A dataset asked by `Key`: what it draws depends on the key alone, and the process's own random states stay."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        numpy_state, python_state = np.random.get_state(), random.getstate()
        with torch.random.fork_rng(devices=[]):
            try:
                return [self._item(seed, index) for seed, index in keys]
            finally:
                np.random.set_state(numpy_state)
                random.setstate(python_state)

    def _item(self, seed: int, index: int) -> Any:
        seed_cpu(seed)
        return self._dataset[index]


def part_size(training: Training, images: int, *, paired: bool, processes: int = 1) -> int:
    """Images that go through a process's model at a time: a part of a batch, or of all `images` where they are fewer.

    Args:
        paired: each image is mixed with another of its part, so the number must be even.
        processes: that share each batch.

    Raises:
        ValueError: a batch that has no such parts, an odd number, or fewer images than parts.
    """
    parts = training.accumulate * processes
    if training.batch_size % parts:
        among = f"{processes} processes, in {training.accumulate} parts each" if processes > 1 else f"{parts} parts"
        raise ValueError(f"batch_size {training.batch_size}, that of all together, does not divide among {among}")
    size = training.batch_size // parts
    if paired and size % 2:
        over = "batch_size / accumulate" + (" / processes" if processes > 1 else "")
        raise ValueError(
            f"augmentation {training.augmentation!r} mixes images in pairs: {over} must be even, not {size}"
        )
    size = min(size, images // parts)
    size -= size % 2 if paired else 0
    if size == 0:
        among = f" and {processes} processes" if processes > 1 else ""
        raise ValueError(f"{images} training images are too few for accumulate: {training.accumulate}{among}")
    return size


@contextmanager
def worker_errors() -> Iterator[None]:
    """A loader's worker wraps what it raises in its traceback: only the line that names the image is kept."""
    try:
        yield
    except UnreadableImageError as error:
        # torch's ExceptionWrapper brings the type and the formatted traceback: the message is nowhere else
        last = str(error).rstrip().splitlines()[-1]
        raise UnreadableImageError(last.rpartition(f"{UnreadableImageError.__name__}: ")[2]) from None
