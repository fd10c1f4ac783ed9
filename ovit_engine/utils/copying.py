"""Copies of models that `copy.deepcopy` alone rejects, or leaves tied to the original."""

import copy
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copy_model(model: M, memo: dict[int, Any] | None = None) -> M:
    """Return a deep copy of `model` whose closures call the copy's modules.

    `deepcopy` refuses tensors that were computed from others, which the old weight_norm, spectral_norm and
    torch.nn.utils.prune leave on a layer; and it keeps functions as they are, those that hold the original's modules
    too.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for held in (vars(module), *(each for each in vars(module).values() if isinstance(each, dict))):
            for key, value in held.items():
                if isinstance(value, FunctionType):
                    held[key] = _rebound(value, memo)
    return copied


def _rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The same function over the copies of the modules and functions that it holds."""
    if id(function) in memo:
        known: FunctionType = memo[id(function)]
        return known
    contents = [cell.cell_contents for cell in function.__closure__ or ()]
    if not any(map(_may_hold_modules, (*contents, function.__defaults__, function.__kwdefaults__))):
        return function
    cells = tuple(CellType() for _ in function.__closure__ or ())
    rebound = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
    memo[id(function)] = rebound
    for old, new in zip(function.__closure__ or (), cells, strict=True):
        new.cell_contents = _held(old.cell_contents, memo)
    rebound.__defaults__ = _held(function.__defaults__, memo)
    rebound.__kwdefaults__ = _held(function.__kwdefaults__, memo)
    vars(rebound).update(vars(function))
    return rebound


def _may_hold_modules(value: Any) -> bool:
    if isinstance(value, FunctionType):
        return bool(value.__closure__ or value.__defaults__)
    if isinstance(value, (list, tuple, dict)):
        return any(map(_may_hold_modules, value.values() if isinstance(value, dict) else value))
    if isinstance(value, MethodType):
        return isinstance(value.__self__, nn.Module)
    return isinstance(value, (nn.Module, Tensor))


def _held(value: Any, memo: dict[int, Any]) -> Any:
    """What stands for a value that a function holds: the copy where there is one."""
    if isinstance(value, FunctionType):
        return _rebound(value, memo)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, memo.get(id(value.__self__), value.__self__))
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_held(each, memo) for each in value)
    if type(value) is dict:
        return {key: _held(each, memo) for key, each in value.items()}
    return memo.get(id(value), value)
