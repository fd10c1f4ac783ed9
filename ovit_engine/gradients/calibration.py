"""Batches and a loss in, gradients for second-order pruners out."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ovit_engine.distributed.sharding import is_shard
from ovit_engine.gradients.backward import LEAST_AT_ONCE, GradientPass, LossFunction
from ovit_engine.gradients.samples import Samples
from ovit_engine.masking.parameters import Slot, parameter_slots, unwrapped
from ovit_engine.utils.random_states import mixed

log = logging.getLogger(__name__)

# Fewer gradients than this are taken one by one: to prove that batching is right costs as much as about four of them.
LEAST_COUNT = 16


class Calibration:
    """A seeded source of gradients at fixed weights.

    Each gradient is the mean over a small batch, as the oViT authors took them; 16 images a gradient gave better masks
    than one (specs/second-order.md §1.7). The user's own loader is never iterated, since that resets it when its
    workers persist: its dataset, collate function and number of workers are used.

    Args:
        data: a DataLoader or a Dataset whose items are (inputs, target), or mappings with "labels" among them; inputs
            are a tensor, a tuple of the model's arguments or a mapping of them by name.
        loss_fn: mean loss of (outputs, targets); plain cross-entropy without label smoothing is what is published.
        seed: of the order of samples and of any augmentation; the same seed gives the same gradients.
    """

    def __init__(self, data: DataLoader[Any] | Dataset[Any], loss_fn: LossFunction, *, seed: int = 0) -> None:
        self._loader_options = _worker_options(data) if isinstance(data, DataLoader) else {}
        self.dataset: Dataset[Any] = _dataset(data) if isinstance(data, DataLoader) else data
        if not isinstance(self.dataset, IterableDataset):
            if not (hasattr(self.dataset, "__getitem__") and hasattr(self.dataset, "__len__")):
                raise TypeError(
                    f"calibration needs a DataLoader or a Dataset (it makes its own loader), not {type(data).__name__}"
                )
            if len(self.dataset) == 0:
                raise ValueError("the calibration dataset is empty")
        self.loss_fn = loss_fn
        self.seed = seed

    @property
    def images(self) -> int | None:
        """How many images there are, None for a stream."""
        return None if isinstance(self.dataset, IterableDataset) else len(self.dataset)  # type: ignore[arg-type]

    def gradients(
        self,
        model: nn.Module,
        slots: Sequence[Slot],
        *,
        count: int,
        images_per_gradient: int,
        chunk: int,
        draw: int = 0,
        share: tuple[int, int] = (0, 1),
        among: Sequence[Slot] = (),
    ) -> Iterator[list[Tensor]]:
        """Yield `count` mean gradients in chunks: a list with one float32 tensor [k, *shape] a slot, k <= chunk.

        `draw` picks another seeded order of the samples, so that each pruning event sees other batches.
        Only one chunk is alive at a time: the tensors are reused, so take what you need before the next one. The model
        runs in eval mode, without autocast and outside any DDP wrapper. Its training flags, `.grad`, buffers,
        `requires_grad` and all random states are afterwards (and between chunks) exactly as before.

        Where arithmetic is small, several gradients are taken from one backward pass. That needs proof: the first two
        gradients of the sequence are also taken one by one, and unless every slot agrees to 1e-5 (of its gradient's
        largest entry), all gradients are taken one by one. Which way is taken does not depend on time or load.

        Args:
            share: (rank, ranks): yield only chunks number rank, rank + ranks, ... of the sequence that one process
                yields, equal bit by bit; the images of the others are not loaded, but for the first two gradients'.
            among: all slots of several passes over parts of them, so that each part comes in the way that all together
                would: bit by bit the same gradients in whichever parts they are asked for.

        Raises:
            ValueError: a slot that the loss does not depend on; a rank that is not below `ranks`; a number below 1; a
                model that is sharded.
        """
        rank, ranks = share
        for what, value in (("count", count), ("images_per_gradient", images_per_gradient), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{what} must be at least 1, not {value!r}")
        if not 0 <= rank < ranks:
            raise ValueError(f"share must be (rank, ranks) with 0 <= rank < ranks, not {share}")
        chunks = [range(first, min(first + chunk, count)) for first in range(0, count, chunk)][rank::ranks]
        seed = mixed(self.seed, draw)
        samples = Samples(self.dataset, images_per_gradient, seed=seed, options=self._loader_options)
        known = [*slots, *(slot for slot in among if slot not in slots)]
        if sharded := next((slot.name for slot in known if is_shard(slot.tensor)), None):
            raise ValueError(
                f"{sharded!r} is sharded: take gradients in `with whole_model(model):`, on all ranks at once"
            )
        work = GradientPass(unwrapped(model), self.loss_fn, known, seed=seed)
        return _chunks(work, samples, len(slots), chunks, count, chunk)

    def forward(
        self, model: nn.Module, *, count: int, images: int, draw: int = 0, share: tuple[int, int] = (0, 1)
    ) -> None:
        """Call `model` without gradients on `count` seeded batches of `images` each, for hooks that watch it.

        As of `gradients`: the model runs in eval mode, without autocast and outside any DDP wrapper, and it and all
        random states are afterwards exactly as before.

        Args:
            share: (rank, ranks): call it on batches number rank, rank + ranks, ... only.
        """
        seed, numbers = mixed(self.seed, draw), range(share[0], count, share[1])
        work = GradientPass(unwrapped(model), self.loss_fn, parameter_slots(model)[:1], seed=seed)
        samples = Samples(self.dataset, images, seed=seed, options=self._loader_options)
        with work.undisturbed():
            for number, batch in zip(numbers, samples.batches(numbers), strict=True):
                work.forward(number, batch)


def _chunks(
    work: GradientPass, samples: Samples, wanted: int, chunks: Sequence[range], count: int, chunk: int
) -> Iterator[list[Tensor]]:
    """These chunks of a sequence of `count` gradients, of the first `wanted` slots of `work`."""
    if not chunks:
        return
    shapes = [(slot.tensor.shape, slot.tensor.device) for slot in work.slots[:wanted]]
    buffers = [torch.empty(min(chunk, count), *shape, device=device) for shape, device in shapes]
    # of every rank the same, so that all choose alike
    tried = 2 if count >= LEAST_COUNT and chunk >= LEAST_AT_ONCE else 0
    with work.undisturbed():
        batches = samples.batches(sorted({*range(tried), *(number for part in chunks for number in part)}))
        kept = dict(enumerate(islice(batches, tried)))
        size = min(chunk, work.gradients_at_once(list(kept.values()))) if kept else 1
    for numbers in chunks:
        with work.undisturbed():
            for part in _parts(len(numbers), size):
                drawn = [(n, kept.pop(n) if n in kept else next(batches)) for n in numbers[part.start : part.stop]]
                work.fill([buffer[part.start : part.stop] for buffer in buffers], drawn)
        yield [buffer[: len(numbers)] for buffer in buffers]
    if wanted == len(work.slots) and work.largest == 0:  # of a part of the slots it may be so
        log.warning(
            "all %d calibration gradients are zero, so they tell no weight from another: does the loss ignore all "
            "labels, is it multiplied by 0, or is the classifier all zeros?",
            sum(map(len, chunks)),
        )


def _parts(count: int, size: int) -> list[range]:
    """`count` places in as few runs of at most `size` as there can be, of nearly equal lengths."""
    pieces = -(-count // size)
    return [range(i * count // pieces, (i + 1) * count // pieces) for i in range(pieces)]


def _dataset(loader: DataLoader[Any]) -> Dataset[Any]:
    """Return what a loader draws from: the part of its dataset that a sampler over indices leaves."""
    if loader.batch_size is None and loader.batch_sampler is None:
        raise TypeError("calibration makes its own batches: give a dataset of single images, not one of whole batches")
    indices = getattr(loader.sampler, "indices", None)
    return loader.dataset if indices is None else Subset(loader.dataset, list(indices))


def _worker_options(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return how the user's loader reads: collation and workers."""
    return {
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
    }
