"""Models that take a batch as keyword arguments and give an object with `loss` and `logits`, as Hugging Face's do."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ovit_engine.engine import Engine
from ovit_engine.gradients.calibration import Calibration
from ovit_engine.masking.parameters import Slot
from ovit_engine.utils.batches import LABELS

IGNORED = -100  # a label that counts for nothing

Collate = Callable[[list[Any]], Mapping[str, Any]]


class KeywordCalibration(Calibration):
    """Calibration with the loss that the model itself gives for a batch with labels.

    Args:
        dataset: of single items.
        collate: makes keyword arguments of the model, labels among them, of a list of items.
    """

    def __init__(self, dataset: Dataset[Any], collate: Collate, *, seed: int = 0) -> None:
        super().__init__(DataLoader(dataset, collate_fn=_Pairs(collate)), _first, seed=seed)

    def gradients(self, model: nn.Module, slots: Sequence[Slot], **options: Any) -> Iterator[list[Tensor]]:
        return super().gradients(_OwnLoss(model), slots, **options)


def deployed(model: nn.Module, inputs: Sequence[str]) -> nn.Module:
    """Turn `model`, a copy, into what is exported: `inputs` are positional arguments, and the logits come out.

    Names of weights stay.
    """
    kind = type(model)

    def forward(self: Any, one: Tensor, two: Any = None, three: Any = None, four: Any = None) -> Any:
        return kind.forward(self, **dict(zip(inputs, (one, two, three, four), strict=False))).logits

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return model


class AddToOwnLoss:
    """A forward hook on the model that adds a recipe's loss terms to the loss in its output.

    A loss that is a share of a larger batch's, as Hugging Face's Trainer asks for by `num_items_in_batch`, gets that
    share of the terms.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        loss, whole = getattr(output, "loss", None), kwargs.get("num_items_in_batch")
        if isinstance(loss, Tensor):
            share = 1.0 if whole is None else int((kwargs["labels"] != IGNORED).sum()) / float(whole)
            output.loss = self._engine.loss(loss / share) * share
        return output


def positional(loader: Iterable[Any]) -> tuple[list[str], list[tuple[tuple[Tensor, ...], Any]]]:
    """Return the names of a batch's inputs, labels left out, and all batches as (inputs in that order, labels)."""
    batches = [dict(batch) for batch in loader]
    names = [name for name in batches[0] if name not in LABELS]
    return names, [(tuple(batch[name] for name in names), batch.get("labels")) for batch in batches]


class _Pairs:
    """(keyword arguments, None) of a list of items; an object, since workers pickle it."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, items: list[Any]) -> tuple[dict[str, Any], None]:
        return dict(self._collate(items)), None


class _OwnLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        return self.model.forward(**batch).loss  # past hooks: they add the terms of a recipe to the loss


def _first(loss: Any, _: None) -> Tensor:
    if not isinstance(loss, torch.Tensor):
        raise ValueError("the model gives no loss for a calibration batch: has the dataset labels?")
    return loss
