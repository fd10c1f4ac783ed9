"""Models that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded: the local part, and the whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_HOOKS = {
    *("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
}

_STATE = "__composable_api_state_key"  # where `fully_shard` keeps what can't be copied: process groups, shards

_FSDP = "torch.distributed.fsdp"


def is_shard(tensor: Tensor) -> bool:
    """Return whether this process holds only a part of a tensor."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, as a plain tensor in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, detached; where it is sharded, all processes must call this at the same time."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def scattered(whole: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor placed and sharded as `like` is; no process waits for another."""
    whole = whole.to(like.device)
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def is_sharded(model: nn.Module) -> bool:
    """Return whether this process holds only parts of the model's parameters."""
    return any(map(is_shard, model.parameters()))


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that `fully_shard` was called on: their class begins with FSDP2's own."""
    return [module for module in model.modules() if _class_without_fsdp(module) is not type(module)]


def reshard(modules: list[nn.Module]) -> None:
    """Shard the parameters of these modules again: after an evaluation some are still whole, and only a copy."""
    for module in modules:
        _reshard(module)


@contextmanager
def whole_model(model: nn.Module) -> Iterator[nn.Module]:
    """`model` with whole, plain parameters on every process and without FSDP2: to calibrate, copy or export it.

    A forward pass inside waits for no other process. All processes must enter at the same time, and each needs memory
    for the whole model without gradients. What is written to its parameters inside is dropped at the end.

    Raises:
        TypeError: a parameter is sharded by something other than `fully_shard`, such as tensor parallelism.
    """
    modules = sharded_modules(model)
    reshard(modules)
    _refuse_others(model, modules)
    restore: list[Callable[[], None]] = []
    try:
        for module in model.modules() if modules else ():
            restore += [_without_fsdp(module), _with_whole_parameters(module)]
        yield model
    finally:
        for undo in reversed(restore):
            undo()


def _class_without_fsdp(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before `fully_shard` made one of it and FSDPModule."""
    kind = type(module)
    bases = kind.__bases__
    if len(bases) == 2 and bases[0].__module__.startswith(_FSDP) and issubclass(bases[1], nn.Module):
        return bases[1]
    return kind


def _reshard(module: Any) -> None:
    module.reshard()


def _refuse_others(model: nn.Module, modules: list[nn.Module]) -> None:
    """Raise TypeError where parameters are sharded in a way that `whole_model` can't undo."""
    managed = {id(inner) for module in modules for inner in module.modules()}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor) and (id(module) not in managed or parameter.device_mesh.ndim > 1):
                raise TypeError(
                    f"{f'{name}.{attribute}'.lstrip('.')!r} is sharded over {parameter.device_mesh}: gradient pruners "
                    "and export know fully_shard over one dimension of processes, and DistributedDataParallel"
                )


def _without_fsdp(module: nn.Module) -> Callable[[], None]:
    """Take FSDP2's class, hooks, state and compiled call from a module; return what puts them back."""
    kind, inside = type(module), module.__dict__
    before = {name: inside[name] for name in inside if name in _HOOKS or name.startswith(_STATE)}
    if inside.get("_compiled_call_impl") is not None:
        before["_compiled_call_impl"] = inside["_compiled_call_impl"]
    for name, value in before.items():
        if name in _HOOKS:
            inside[name] = type(value)((key, hook) for key, hook in value.items() if not _is_of_fsdp(hook))
        else:
            del inside[name]
    module.__class__ = _class_without_fsdp(module)

    def undo() -> None:
        module.__class__ = kind
        inside.update(before)

    return undo


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)


def _with_whole_parameters(module: nn.Module) -> Callable[[], None]:
    """Put gathered parameters in place of sharded ones; return what puts those back."""
    before = {name: p for name, p in module._parameters.items() if p is not None and isinstance(p, DTensor)}
    for name, parameter in before.items():
        module._parameters[name] = nn.Parameter(gathered(parameter), parameter.requires_grad)

    def undo() -> None:
        module._parameters.update(before)

    return undo
