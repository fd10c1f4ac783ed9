"""Where two saved states differ, to the last bit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """One place in nested states, and how it differs there."""

    where: str  # "model.blocks.0.attn.qkv.weight"
    how: str

    def __str__(self) -> str:
        return f"{self.where}: {self.how}"


def differences(one: Any, two: Any, where: str = "") -> Iterator[Difference]:
    """Every leaf of nested mappings and sequences that is not the same in both: tensors by their bits, others by type
    and value. Bits tell -0.0 from 0.0, and a NaN is the same as itself.
    """
    if type(one) is not type(two):
        yield Difference(where, f"{type(one).__name__} in one, {type(two).__name__} in the other")
    elif isinstance(one, Tensor):
        how = _tensor_difference(one, two)
        if how is not None:
            yield Difference(where, how)
    elif isinstance(one, Mapping):
        for key in dict.fromkeys([*one, *two]):
            inner = f"{where}.{key}" if where else str(key)
            if key not in one or key not in two:
                yield Difference(inner, f"only in the {'first' if key in one else 'second'}")
            else:
                yield from differences(one[key], two[key], inner)
    elif isinstance(one, (list, tuple)):
        if len(one) != len(two):
            yield Difference(where, f"{len(one)} entries in one, {len(two)} in the other")
        for index, (first, second) in enumerate(zip(one, two, strict=False)):
            yield from differences(first, second, f"{where}[{index}]")
    elif repr(one) != repr(two):  # of floats exact, and NaN is the same as itself
        yield Difference(where, f"{one!r} in one, {two!r} in the other")


def _tensor_difference(one: Tensor, two: Tensor) -> str | None:
    if one.dtype != two.dtype or one.shape != two.shape:
        return f"{one.dtype} {list(one.shape)} in one, {two.dtype} {list(two.shape)} in the other"
    apart = (_bytes(one) != _bytes(two)).any(dim=1)
    if not apart.any():
        return None
    count = f"{int(apart.sum())} of {apart.numel()} entries differ"
    if one.is_complex():
        return count
    distance = (one.flatten().double() - two.flatten().double()).abs()[apart]
    return f"{count}, by up to {float(distance.max()):.3g}"


def _bytes(tensor: Tensor) -> Tensor:
    """uint8 [numel, bytes of one]."""
    return tensor.detach().cpu().contiguous().reshape(-1, 1).view(torch.uint8)
