"""Batches and a loss in, gradients for second-order pruners out."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset

from ovit_engine.targets import Slot

LossFunction = Callable[[Any, Any], Tensor]


class Calibration:
    """A seeded source of gradients at fixed weights.

    Each gradient is the mean over a small batch, as the oViT authors took them; 16 images a gradient gave better masks
    than one (specs/second-order.md §1.7). The user's own loader is never iterated, since that resets it when its
    workers persist: its dataset, collate function and number of workers are used.

    Args:
        data: a DataLoader or a Dataset whose items are (inputs, target).
        loss_fn: mean loss of (outputs, targets); plain cross-entropy without label smoothing is what is published.
        seed: of the order of samples and of any augmentation; the same seed gives the same gradients.
    """

    def __init__(self, data: DataLoader[Any] | Dataset[Any], loss_fn: LossFunction, *, seed: int = 0) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(outputs, targets), not {loss_fn!r}")
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

    def gradients(
        self,
        model: nn.Module,
        slots: Sequence[Slot],
        *,
        count: int,
        images_per_gradient: int,
        chunk: int,
        draw: int = 0,
    ) -> Iterator[list[Tensor]]:
        """Yield `count` mean gradients in chunks: a list with one float32 tensor [k, *shape] a slot, k <= chunk.

        `draw` picks another seeded order of the samples, so that each pruning event sees other batches.
        Only one chunk is alive at a time: the tensors are reused, so take what you need before the next one. The model
        runs in eval mode, without autocast. Its training flags, `.grad`, buffers, `requires_grad` and all random states
        are afterwards (and between chunks) exactly as before.

        Raises:
            ValueError: a slot that the loss does not depend on.
        """
        seed = self.seed + 1_000_003 * draw
        batches = self._batches(images_per_gradient, seed)
        buffers = [torch.empty(min(chunk, count), *slot.tensor.shape, device=slot.tensor.device) for slot in slots]
        with _seeded(seed):
            own = _random_state()
        for first in range(0, count, chunk):
            size = min(chunk, count - first)
            state = _random_state()
            _set_random_state(own)
            try:
                with _frozen(model, slots), torch.enable_grad():
                    for row in range(size):
                        self._one(model, slots, next(batches), buffers, row)
            finally:
                own = _random_state()
                _set_random_state(state)
            yield [buffer[:size] for buffer in buffers]

    def _one(self, model: nn.Module, slots: Sequence[Slot], batch: Any, buffers: list[Tensor], row: int) -> None:
        inputs, targets = _split(batch, slots[0].tensor)
        with torch.autocast(slots[0].tensor.device.type, enabled=False):
            loss = self.loss_fn(model(inputs), targets)
        if not isinstance(loss, Tensor) or loss.ndim:
            shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn must return the mean loss as a scalar tensor, not {shape}")
        if not loss.requires_grad:
            raise ValueError(f"the calibration loss does not depend on {slots[0].name!r}: is it detached?")
        grads = torch.autograd.grad(loss, [slot.tensor for slot in slots], allow_unused=True)
        for slot, grad, buffer in zip(slots, grads, buffers, strict=True):
            if grad is None:
                raise ValueError(f"the calibration loss does not depend on {slot.name!r}: leave it out of the targets")
            buffer[row].copy_(grad)

    def _batches(self, size: int, seed: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            seen = 0
            for batch in self._loader(size, generator):
                seen += 1
                yield batch
            if not seen:
                raise ValueError("the calibration dataset yields no batch")

    def _loader(self, size: int, generator: torch.Generator) -> DataLoader[Any]:
        if isinstance(self.dataset, IterableDataset):
            return DataLoader(self.dataset, batch_size=size, generator=generator, **self._loader_options)
        count = len(self.dataset)  # type: ignore[arg-type]
        # whole batches only: a gradient of fewer images has another scale, which damping would feel
        return DataLoader(
            self.dataset,
            batch_size=min(size, count),
            sampler=RandomSampler(self.dataset, generator=generator),  # type: ignore[arg-type]
            drop_last=True,
            generator=generator,
            **self._loader_options,
        )


def _dataset(loader: DataLoader[Any]) -> Dataset[Any]:
    """What a loader draws from: the part of its dataset that a sampler over indices leaves."""
    if loader.batch_size is None and loader.batch_sampler is None:
        raise TypeError("calibration makes its own batches: give a dataset of single images, not one of whole batches")
    indices = getattr(loader.sampler, "indices", None)
    return loader.dataset if indices is None else Subset(loader.dataset, list(indices))


def _worker_options(loader: DataLoader[Any]) -> dict[str, Any]:
    """How the user's loader reads: collation and workers, which are seeded from our generator."""
    return {
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
    }


def _split(batch: Any, like: Tensor) -> tuple[Any, Any]:
    """Inputs and targets on the weights' device, float inputs in the weights' type."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"calibration batches must be (inputs, targets), not {type(batch).__name__}")
    inputs, targets = (part.to(like.device) if isinstance(part, Tensor) else part for part in batch)
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        inputs = inputs.to(like.dtype)
    return inputs, targets


@contextmanager
def _frozen(model: nn.Module, slots: Sequence[Slot]) -> Iterator[None]:
    """The model in eval mode with the slots differentiable; everything that could move is put back."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    frozen = [slot.tensor for slot in slots if not slot.tensor.requires_grad]
    model.eval()
    for tensor in frozen:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
        for module, flag in flags:
            module.training = flag
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                buffer.copy_(before)
                setattr(module, name, buffer)  # a model may bind a new tensor in forward


RandomState = tuple[Tensor, list[Tensor], Any, Any]


def _random_state() -> RandomState:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's random states started from `seed`, then put back."""
    before = _random_state()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        _set_random_state(before)
