"""Parameters of a model by owner and name, the model inside its wrappers, and whether an engine is attached to it."""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ovit_engine.distributed.sharding import gathered, scattered

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module)\.")

_MARK = "_ovit_engine"  # the attribute of a model to which an engine is attached

SCORER = "token_predictor"  # the submodule of a block that scores tokens: only a name in full chooses what lies in it


@dataclass(frozen=True)
class Slot:
    """One parameter by owner and attribute. The tensor is looked up at every use, since FSDP2 replaces it."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        """The parameter as it is now: the whole tensor, or this rank's shard as a DTensor."""
        tensor = getattr(self.module, self.attribute)
        assert isinstance(tensor, Tensor)
        return tensor

    @property
    def owner_name(self) -> str:
        """The name of the module that owns the parameter; "" is the model itself."""
        return self.name.rpartition(".")[0]

    def gather(self) -> Tensor:
        """Return the whole weight, detached, on every rank."""
        return gathered(self.tensor)

    def scatter(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor that this rank holds, placed as the weight is; no rank waits for another."""
        return scattered(whole, self.tensor)

    @torch.no_grad()
    def write(self, whole: Tensor) -> None:
        """Copy a whole weight into the parameter, in place."""
        self.tensor.copy_(self.scatter(whole))


def clean_name(name: str) -> str:
    """`name` without the prefixes of DDP, torch.compile and FSDP wrappers."""
    return _WRAPPERS.sub("", f"{name}.")[:-1]


def is_scorer(name: str) -> bool:
    """Return whether a parameter or module of this name scores tokens: what is made of it stays dense and float."""
    return SCORER in name.split(".")


def parameter_slots(model: nn.Module) -> list[Slot]:
    """Return every parameter of `model` once, in the model's order; a tied weight stands under its first name."""
    seen: set[int] = set()
    slots: list[Slot] = []
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                slots.append(Slot(clean_name(f"{path}.{attribute}".lstrip(".")), module, attribute))
    for name, count in Counter(slot.name for slot in slots).items():
        if count > 1:
            raise ValueError(f"two parameters are called {name!r} once wrapper names such as module. are cut")
    return slots


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel or an averaging wrapper (torch's, or timm's ModelEma)."""
    if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        return unwrapped(inner)
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)
    if isinstance(model, wrappers) or type(model).__name__.startswith("ModelEma"):
        inner = model.module
        assert isinstance(inner, nn.Module)
        return unwrapped(inner)
    return model


class Mark:
    """A handle, like those of hooks: until it is removed, an engine is attached to `model`.

    A copy or a pickle of the model has none: no engine watches that one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrapped(model)
        vars(self._model)[_MARK] = self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def remove(self) -> None:
        """Say that the engine is detached."""
        if vars(self._model).get(_MARK) is self:
            del vars(self._model)[_MARK]


def is_attached(model: nn.Module) -> bool:
    """Return whether an engine is attached to `model`, which must not lose heads or units meanwhile."""
    return isinstance(vars(unwrapped(model)).get(_MARK), Mark)
