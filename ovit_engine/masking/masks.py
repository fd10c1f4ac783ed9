"""Masks, held by projection: the one place where weights become zero."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ovit_engine.distributed.sharding import local_part
from ovit_engine.masking.parameters import Slot, parameter_slots
from ovit_engine.pruning.patterns import Spelling


class Masks:
    """A mask for each pruned slot, held by projection: weights are zeroed after every step.

    Masked gradients alone do not hold zeros: momentum and weight decay bring them back (specs/events.md), and dense
    gradients are what second-order scores and regrowth need.
    """

    def __init__(self) -> None:
        self.changed = False  # since the engine last looked: copies of the model follow then
        self._slots: dict[str, Slot] = {}
        self._pruned: dict[str, Tensor] = {}  # True = zero; the part that this process holds (a shard under FSDP2)
        self._bits: dict[str, Tensor | None] = {}  # the same as bits to keep, where that is faster
        self._whole: dict[str, Tensor] = {}  # True = kept; whole on every rank
        self._patterns: dict[str, Spelling] = {}

    def set(self, slot: Slot, mask: Tensor, pattern: Spelling = "unstructured") -> None:
        """Prune `slot` where the boolean `mask`, shaped as the whole weight, is False.

        `pattern` is how a recipe spells what the zeros follow: export checks the file against it.

        Raises:
            ValueError: the mask has another shape or is not boolean.
        """
        if mask.dtype != torch.bool or mask.shape != slot.tensor.shape:
            raise ValueError(
                f"mask of {slot.name!r} must be boolean of shape {tuple(slot.tensor.shape)}, "
                f"not {mask.dtype} of {tuple(mask.shape)}"
            )
        self._store(slot, mask, pattern)
        self.project([slot.name])

    def _store(self, slot: Slot, mask: Tensor, pattern: Spelling) -> None:
        self._slots[slot.name] = slot
        self._whole[slot.name] = mask.detach().clone()
        self._patterns[slot.name] = pattern
        self._place(slot)
        self.changed = True

    def place(self) -> None:
        """Follow the weights to where they are now: a state is loaded before the model is sharded, or moves."""
        for slot in self._slots.values():
            self._place(slot)

    def _place(self, slot: Slot) -> None:
        whole = self._whole[slot.name] = self._whole[slot.name].to(slot.tensor.device)
        self._pruned[slot.name] = local_part(slot.scatter(~whole))
        self._bits[slot.name] = _kept_bits(self._pruned[slot.name], local_part(slot.tensor))

    def get(self, name: str) -> Tensor | None:
        """Return the whole mask of a weight (True = kept), or None where it is dense."""
        return self._whole.get(name)

    def pattern(self, name: str) -> Spelling:
        """Return how a recipe spells the pattern of a masked weight."""
        return self._patterns[name]

    def names(self) -> list[str]:
        """Return the weights that have a mask."""
        return list(self._slots)

    @torch.no_grad()
    def project(self, names: Iterable[str] | None = None) -> None:
        """Zero the pruned weights again. Not by a product: that leaves -0.0, and NaN where weights are NaN or inf."""
        for name in self._pruned if names is None else names:
            weight, pruned = local_part(self._slots[name].tensor), self._pruned[name]
            if pruned.device != weight.device:
                raise RuntimeError(
                    f"{name!r} moved from {pruned.device} to {weight.device} after attach: move the model first"
                )
            bits = self._bits[name]
            if bits is not None and bits.element_size() == weight.element_size():
                weight.view(bits.dtype).bitwise_and_(bits)
            else:
                weight.masked_fill_(pruned, 0.0)

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Zero the gradients of pruned weights: needed inside closures, whose line search would use them."""
        for name, pruned in self._pruned.items():
            grad = self._slots[name].tensor.grad
            if grad is not None:
                local_part(grad).masked_fill_(pruned, 0.0)

    @torch.no_grad()
    def apply_to(self, model: nn.Module) -> None:
        """Zero the same weights in another copy of the model, such as an EMA copy."""
        slots = {slot.name: slot for slot in parameter_slots(model)}
        for name, mask in self._whole.items():
            if name not in slots:
                raise ValueError(f"the copy has no weight {name!r} to mask: is it a copy of this model?")
            slots[name].tensor.masked_fill_(slots[name].scatter(~mask), 0.0)

    def sparsity(self, name: str | None = None) -> float:
        """Return the share of pruned weights, of one weight or over all masked ones (0.0 where nothing is masked)."""
        masks = list(self._whole.values()) if name is None else [self._whole[name]]
        total = sum(mask.numel() for mask in masks)
        return sum(int((~mask).sum()) for mask in masks) / total if total else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return masks as packed bits: one uint8 tensor, the shape and the pattern for each weight."""
        return {name: {**pack_mask(mask), "pattern": self._patterns[name]} for name, mask in self._whole.items()}

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Set the masks of `state` on the weights of `model`, all of them or, where one does not fit, none.

        Raises:
            ValueError: a masked weight that the model lacks, or that has another shape; a damaged mask.
        """
        slots = {slot.name: slot for slot in parameter_slots(model)}
        missing = [name for name in state if name not in slots]
        if missing:
            raise ValueError(f"the checkpoint masks {missing[0]!r}, which {type(model).__name__} does not have")
        for name, packed in state.items():
            if not isinstance(packed, Mapping) or "pattern" not in packed:
                raise ValueError(f"the checkpoint's mask of {name!r} is damaged: it has no shape, bits and pattern")
            check_packed(name, packed, slots[name].tensor.shape)
        self._slots, self._pruned, self._bits, self._whole, self._patterns = {}, {}, {}, {}, {}
        for name, packed in state.items():  # not projected: weights that are none of a pruned model are told later
            self._store(slots[name], unpack_mask(packed).to(slots[name].tensor.device), packed["pattern"])

    def check_weights(self) -> None:
        """Raise RuntimeError where a pruned weight is not zero: the model's state was not loaded with the masks."""
        for name, pruned in self._pruned.items():
            weight = local_part(self._slots[name].tensor)
            if not weight.is_meta and bool(weight[pruned].any()):
                raise RuntimeError(
                    f"the masks that were loaded prune {name!r}, whose weights are not zero there: call "
                    "model.load_state_dict(...) between engine.load_state_dict(...) and engine.attach(optimizer)"
                )


def _kept_bits(pruned: Tensor, weight: Tensor) -> Tensor | None:
    """Return all ones where a weight is kept. On the CPU `and` on the bits is ten times faster than `masked_fill_`."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(weight.element_size())
    if kind is None or weight.device.type != "cpu":
        return None
    return (~pruned).to(kind).neg_()


def pack_mask(mask: Tensor) -> dict[str, Any]:
    """Return a boolean tensor as its shape and one uint8 tensor of bits."""
    bits = np.packbits(mask.cpu().numpy().reshape(-1))
    return {"shape": list(mask.shape), "bits": torch.from_numpy(bits)}


def check_packed(name: str, packed: Any, shape: torch.Size) -> None:
    """Raise ValueError where `packed` is not what `pack_mask` makes of a mask of this shape."""
    if not isinstance(packed, Mapping) or not {"shape", "bits"} <= set(packed):
        raise ValueError(f"the checkpoint's mask of {name!r} is damaged: it has no shape and bits")
    if list(packed["shape"]) != list(shape):
        raise ValueError(f"the checkpoint's mask of {name!r} is {list(packed['shape'])}, the weight {list(shape)}")
    bits, size = packed["bits"], -(-shape.numel() // 8)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != (size,):
        found = f"{bits.dtype} of {list(bits.shape)}" if isinstance(bits, Tensor) else type(bits).__name__
        raise ValueError(f"the checkpoint's mask of {name!r} is damaged: its bits must be {size} bytes, not {found}")


def unpack_mask(packed: Mapping[str, Any]) -> Tensor:
    """Return the boolean tensor that `pack_mask` was given, on the CPU."""
    shape = torch.Size(packed["shape"])
    bits = np.unpackbits(packed["bits"].cpu().numpy(), count=shape.numel())
    return torch.from_numpy(bits.astype(bool)).reshape(shape)
