"""Theoretical floating-point operations of a forward pass, dense and with pruned weights left out."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ovit_engine.masking.masks import Masks
from ovit_engine.masking.parameters import Slot, parameter_slots, unwrapped
from ovit_engine.utils.autograd import eval_mode

_aten = torch.ops.aten
# torch 2.11 has formulas for attention on GPUs alone
_FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    **flop_registry,
}


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass of the whole batch; a multiply-add is two."""

    dense: int
    sparse: float

    @property
    def reduction(self) -> float:
        """Share of the dense operations that pruning saves if every zero is skipped (oViT's Table 2)."""
        return 1 - self.sparse / self.dense if self.dense else 0.0


def count_flops(
    model: nn.Module, example_inputs: Tensor | tuple[Any, ...], masks: Masks | Mapping[str, Tensor] | None = None
) -> Flops:
    """Count the matrix products and convolutions of one forward pass in eval mode.

    A product with a masked weight counts as the share of it that is kept, also where a layer uses a part of its weight
    or quantizes it first. All else counts in full: dense layers, and the two products of attention, however they are
    computed. Additions, norms and activations are left out, as is the habit (timm's and torch's tables).

    Args:
        model: on any device, meta included; training flags are put back.
        example_inputs: one batch as the model takes it; [1, C, H, W] gives operations an image.
        masks: True = kept, by parameter name.

    Raises:
        ValueError: a mask of another shape than its weight, or of a weight that the model lacks.
    """
    model = unwrapped(model)
    counter = _Counter(_densities(model, masks))
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    moved = [part.to(device) if isinstance(part, Tensor) else part for part in inputs]
    with _unfused_inference(model), counter.watching(), counter:
        model(*moved)
    return Flops(counter.dense, counter.sparse)


@dataclass
class _Masked:
    """A pruned weight while operations are counted."""

    slot: Slot
    kept: Tensor  # boolean, laid out in memory as the weight is: a view of the weight is the same view of this
    recognised: bool = False  # an operation took the weight itself, not something made from it

    def holds(self, view: Tensor) -> bool:
        """Return whether `view` is the weight, or a slice or transpose of it."""
        weight = self.slot.tensor
        same = StorageWeakRef(view.untyped_storage()) == StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
        offset = int(view.storage_offset()) - int(weight.storage_offset())
        return same and 0 <= offset < weight.numel()

    def density(self, view: Tensor) -> float:
        """Return the share kept of such a view."""
        offset = view.storage_offset() - self.slot.tensor.storage_offset()
        return int(self.kept.as_strided(view.shape, view.stride(), offset).sum()) / view.numel()


class _Counter(TorchDispatchMode):
    def __init__(self, masked: list[_Masked]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dense = 0
        self.sparse = 0.0
        self._masked = masked
        self._running: list[nn.Module] = []  # those of the owners of masked weights that are in their forward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            operations = int(formula(*args, **(kwargs or {}), out_val=out))
            self.dense += operations
            self.sparse += operations * self._density([arg for arg in args if isinstance(arg, Tensor)])
        return out

    def _density(self, operands: list[Tensor]) -> float:
        for operand in operands:
            for each in self._masked if operand.ndim > 1 else ():
                if each.holds(operand):
                    each.recognised = True
                    return each.density(operand)
        for each in self._masked:  # a fake-quantized weight is another tensor of the same shape
            if self._running and each.slot.module is self._running[-1] and not each.recognised:
                shape = sorted(each.slot.tensor.shape)
                if any(sorted(operand.shape) == shape for operand in operands):
                    return int(each.kept.sum()) / each.kept.numel()
        return 1.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know which owner of a masked weight is running."""
        with ExitStack() as stack:
            for module in {id(each.slot.module): each.slot.module for each in self._masked}.values():
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._running.append(module)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()


def _densities(model: nn.Module, masks: Masks | Mapping[str, Tensor] | None) -> list[_Masked]:
    if masks is None:
        return []
    if isinstance(masks, Masks):
        masks = {name: mask for name in masks.names() if (mask := masks.get(name)) is not None}
    slots = {slot.name: slot for slot in parameter_slots(model)}
    found = []
    for name, mask in masks.items():
        if name not in slots:
            raise ValueError(f"the model has no weight {name!r} to which the mask belongs")
        weight = slots[name].tensor
        if mask.shape != weight.shape:
            raise ValueError(f"the mask of {name!r} is {list(mask.shape)}, the weight {list(weight.shape)}")
        kept = torch.empty_strided(weight.shape, weight.stride(), dtype=torch.bool, device=mask.device).copy_(mask)
        found.append(_Masked(slots[name], kept))
    return found


@contextmanager
def _unfused_inference(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and no fused transformer layers, whose products can't be seen."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eval_mode(model), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
