"""Gradients of a model at fixed weights: one by one, or several from one backward pass where that is proved right."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ovit_engine.gradients.batched import Recorder, Trace, batch_size_of, batched_gradients, record, split_outputs
from ovit_engine.masking.parameters import Slot
from ovit_engine.utils.autograd import eval_mode
from ovit_engine.utils.batches import LABELS, split_batch
from ovit_engine.utils.random_states import mixed, random_state, seed_everything, set_random_state

LossFunction = Callable[[Any, Any], Tensor]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # arguments by position and by name

log = logging.getLogger(__name__)

# Linear layers and convolutions put out at most so many numbers in one backward pass of several gradients, and several
# are at least so many. From CPU seconds on one core (benchmarks/gradients.py): a ViT on digits was fastest with 3 to 5
# million numbers a pass; with 10 million, which leave every cache, the gain was half gone. With fewer than 4 gradients,
# or from 3 million numbers a gradient on (ResNet10 at 64 pixels, DeiT-Tiny at 224), one pass each was as fast.
ACTIVATIONS = 2**22

LEAST_AT_ONCE = 4

# How far a batched gradient may be from one of its own backward pass, relative to its largest entry.
TOLERANCE = 1e-5


class GradientPass:
    """Gradients of `slots`; the way to them is chosen for all slots together.

    Args:
        seed: of what the model and the loss draw at random, with the number of the gradient.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, slots: Sequence[Slot], *, seed: int) -> None:
        self.model, self.loss_fn, self.slots, self.seed = model, loss_fn, list(slots), seed
        parameters = inspect.signature(model.forward).parameters
        self._takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        self._accepted = set(parameters)
        self.largest = 0.0  # entry of all gradients so far
        self._losses: dict[int, Tensor] = {}  # of numbered batches, since the last check
        self._trace: Trace | None = None  # of a batched forward pass that was proved right

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """The model ready for gradients; afterwards it and all random states are as before."""
        state = random_state()
        device = self.slots[0].tensor.device.type
        try:
            with _frozen(self.model, self.slots), torch.enable_grad(), torch.autocast(device, enabled=False):
                yield
        finally:
            set_random_state(state)

    def gradients_at_once(self, batches: Sequence[Any]) -> int:
        """Return how many gradients to take from one backward pass, tried with the first batches of the sequence.

        1 where arithmetic outweighs what batching saves, or where a batched gradient is not that of a pass of its own.
        """
        activations = 0
        reason = self._obstacle()
        if reason is None:
            try:
                activations = self._activations(_cloned(batches[0]))
            except Exception as error:
                reason = f"the model does not take one image: {error!r}"
        if reason is None and activations * LEAST_AT_ONCE > ACTIVATIONS:
            reason = f"{activations} activations a gradient are work enough for one"
        if reason is None:
            reason = self._difference(list(enumerate(batches)))
        if reason is not None:
            log.debug("one gradient a backward pass: %s", reason)
            return 1
        size = ACTIVATIONS // max(activations, 1)
        log.debug("up to %d gradients a backward pass, of %d activations each", size, activations)
        return size

    def fill(self, rows: Sequence[Tensor], batches: Sequence[tuple[int, Any]]) -> None:
        """Write the gradients of the first slots, one for each numbered batch, to `rows` [len(batches), *shape] a slot.

        Raises:
            TypeError: the loss is no scalar, a batch no pair.
            ValueError: a slot that the loss does not depend on, a gradient that is no number.
        """
        slots = self.slots[: len(rows)]
        if len(batches) < 2 or self._trace is None or self._batched(slots, rows, batches) != self._trace:
            for place, (number, batch) in enumerate(batches):
                for row, grad in zip(rows, self._plain(slots, number, batch), strict=True):
                    row[place].copy_(grad)
        self._check([number for number, _ in batches], rows)

    def _check(self, numbers: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Raise ValueError for a loss or a gradient that is no number; one wait for the device a call."""
        largest = torch.stack([row[: len(numbers)].flatten(1).abs().amax(1).double().cpu() for row in rows]).amax(0)
        losses = dict(zip(self._losses, torch.stack(list(self._losses.values())).tolist(), strict=True))
        self._losses.clear()
        for number, entry in zip(numbers, largest.tolist(), strict=True):
            if not math.isfinite(losses[number]) or not math.isfinite(entry):
                raise ValueError(
                    f"calibration batch {number} (from 0): the loss is {losses[number]:g}, the largest entry of its "
                    f"gradient {entry:g}. Does it hold no image with a valid label (a mean over none is nan), or "
                    "values that are no number?"
                )
        self.largest = max(self.largest, float(largest.max()))

    @torch.no_grad()
    def forward(self, number: int, batch: Any) -> None:
        """Call the model on the inputs of a numbered batch, for hooks that watch it."""
        inputs, _ = _inputs_and_targets(batch, self.slots[0].tensor)
        seed_everything(mixed(self.seed, 1, number))
        self._outputs(inputs)

    def _outputs(self, inputs: Inputs) -> Any:
        args, kwargs = inputs
        if (
            not args and len(kwargs) == 1 and not self._takes_any and not self._accepted & kwargs.keys()
        ):  # a name of the data's own
            return self.model(*kwargs.values())
        return self.model(*args, **kwargs)

    def _plain(self, slots: Sequence[Slot], number: int, batch: Any) -> list[Tensor]:
        """Return one gradient of each slot by a backward pass of its own."""
        inputs, targets = _inputs_and_targets(batch, slots[0].tensor)
        seed_everything(mixed(self.seed, 1, number))
        loss = self._loss(number, self._outputs(inputs), targets)
        grads = torch.autograd.grad(loss, [slot.tensor for slot in slots], allow_unused=True)
        for slot, grad in zip(slots, grads, strict=True):
            if grad is None:
                raise ValueError(f"the calibration loss does not depend on {slot.name!r}: leave it out of the targets")
        return list(grads)

    def _batched(
        self, slots: Sequence[Slot], rows: Sequence[Tensor], batches: Sequence[tuple[int, Any]]
    ) -> Trace | None:
        """Write gradients to `rows` by one backward pass, and return what the model did; None where that can't be.

        What the model or the backward pass raises is no error yet: it may only refuse so many images at once. What the
        loss raises is one, since it sees what it would see otherwise.
        """
        pairs = [_inputs_and_targets(batch, slots[0].tensor) for _, batch in batches]
        seed_everything(mixed(self.seed, 2, batches[0][0]))
        try:
            outputs, recorder = record(self._outputs, [x for x, _ in pairs], [slot.tensor for slot in slots])
        except Exception as error:
            log.debug("no batched forward pass: %r", error)
            return None
        losses = []
        for (number, _), output, (_, targets) in zip(batches, outputs, pairs, strict=True):
            seed_everything(mixed(self.seed, 1, number))
            losses.append(self._loss(number, output, targets))
        try:
            seen = batched_gradients(losses, recorder, rows)
        except Exception as error:
            log.debug("no batched backward pass: %r", error)
            return None
        return recorder.trace if seen else None

    def _loss(self, number: int, outputs: Any, targets: Any) -> Tensor:
        loss = self.loss_fn(outputs, targets)
        if not isinstance(loss, Tensor) or loss.ndim:
            shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn must return the mean loss as a scalar tensor, not {shape}")
        if not loss.requires_grad:
            raise ValueError(f"the calibration loss does not depend on {self.slots[0].name!r}: is it detached?")
        self._losses[number] = loss.detach().float()
        return loss

    def _obstacle(self) -> str | None:
        """Why batching is not tried, if it is not."""
        tensors = [slot.tensor for slot in self.slots]
        if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
            return "a weight is sharded or of a class of its own"
        if any(tensor.dtype != torch.float32 for tensor in tensors):
            return "weights are not float32"
        if any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in self.model.modules()):
            return "a part of the model is compiled"  # what it calls is not seen
        return None

    def _activations(self, batch: Any) -> int:
        """How many numbers all linear layers and convolutions of the model put out for one gradient, by one image."""
        inputs, _ = _inputs_and_targets(batch, self.slots[0].tensor)
        rows, recorder = batch_size_of(inputs), Recorder()
        with recorder:
            self._outputs(split_outputs(inputs, rows, rows)[0])
        return recorder.activations * rows

    def _difference(self, batches: Sequence[tuple[int, Any]]) -> str | None:
        """Why batched gradients of these batches are not right, if they are not."""
        singles = [self._plain(self.slots, number, _cloned(batch)) for number, batch in batches]
        pair = [torch.empty(len(batches), *grad.shape, device=grad.device) for grad in singles[0]]
        trace = self._batched(self.slots, pair, [(number, _cloned(batch)) for number, batch in batches])
        if trace is None:
            return "no other way was found"
        for slot, rows, grads in zip(self.slots, pair, zip(*singles, strict=True), strict=True):
            for row, grad in zip(rows, grads, strict=True):
                largest, difference = float(grad.abs().max()), float((row - grad).abs().max())
                if not 0 < largest < math.inf or not difference <= TOLERANCE * largest:
                    return f"{slot.name} would be {difference:.2g} off, where its largest entry is {largest:.2g}"
        self._trace = trace
        return None


def _cloned(batch: Any) -> Any:
    """Return a batch that a model may write into, where it is needed again."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)


def _inputs_and_targets(batch: Any, like: Tensor) -> tuple[Inputs, Any]:
    """Inputs and targets on the weights' device, float inputs in the weights' type."""
    if not isinstance(batch, (tuple, list, Mapping)):
        raise TypeError(f"calibration batches must be (inputs, targets) or a mapping, not {type(batch).__name__}")
    args, kwargs, targets = split_batch(batch)
    if targets is None and (isinstance(batch, Mapping) or len(batch) < 2):
        raise TypeError(
            f"calibration batches hold no targets: give (inputs, targets), or a mapping with {', '.join(LABELS)}"
        )

    def moved(leaf: Any) -> Any:
        return leaf.to(like.device) if isinstance(leaf, Tensor) else leaf

    def fitting(leaf: Any) -> Any:
        return leaf.to(like.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(lambda leaf: fitting(moved(leaf)), (args, kwargs)), tree_map(moved, targets)


@contextmanager
def _frozen(model: nn.Module, slots: Sequence[Slot]) -> Iterator[None]:
    """Put the model in eval mode with the slots differentiable; everything that could move is put back."""
    # Accelerate puts a forward that runs in autocast on the object itself
    replaced = [(module, module.forward) for module in model.modules() if "_original_forward" in vars(module)]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    frozen = [slot.tensor for slot in slots if not slot.tensor.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_(True)
    for module, _ in replaced:
        module.forward = vars(module)["_original_forward"]
    try:
        with eval_mode(model):
            yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
        for module, forward in replaced:
            module.forward = forward
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                buffer.copy_(before)
                setattr(module, name, buffer)  # a model may bind a new tensor in forward
