"""Optimizers that wrap others, and where their hooks go."""

import sys
from types import MappingProxyType

from torch import nn
from torch.optim import Optimizer

from ovit_engine.distributed.sharding import is_shard

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def layers_of(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizer that moves the weights, then the wrappers around it (Lookahead), from the inside out.

    A wrapper may write weights after the inner step, and may call it at some steps only: the inner one is the clock,
    masks hold after the step of each. Those that skip torch's constructor get the hooks that it would have made.
    """
    chain = [optimizer]
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":  # after the inner step each rank has moved its share only
        return chain
    while inner := [v for v in vars(chain[0]).values() if isinstance(v, Optimizer) and all(v is not c for c in chain)]:
        chain.insert(0, inner[0])
    for each in chain:
        if each is not chain[0] or _HOOKS[0] not in vars(each):
            Optimizer.__setstate__(each, {})  # as after unpickling: hook dictionaries, and a `step` that reads them
            for hooks in _HOOKS:  # torch patches `step` of the class, so all objects of that class need them
                if not hasattr(type(each), hooks):
                    setattr(type(each), hooks, MappingProxyType({}))
    return chain


def is_compiled(module: nn.Module) -> bool:
    """Return whether `torch.compile(module)` made this module, or `module.compile()` was called on it."""
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes seconds; until it is, nothing is compiled
    wrapped = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    return wrapped or module._compiled_call_impl is not None


def wrapping(model: nn.Module) -> str | None:
    """Return how a model is wrapped, if it is.

    Nothing shows that the user kept `torch.compile(model)` and gave us `model`: `forget_compiled` lets torch compile
    that again.
    """
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return "wrapped in DistributedDataParallel"
        if is_compiled(module):
            return "compiled"
        if any(map(is_shard, module.parameters(recurse=False))):
            return "sharded"
    return None


def is_of_deepspeed(kind: type) -> bool:
    """Return whether a class or a base of it is DeepSpeed's; its plain optimizers (FusedAdam) do not count."""
    return any(base.__module__.startswith("deepspeed.runtime") for base in kind.__mro__)


def nests(optimizer: Optimizer) -> bool:
    """Return whether `step` may call that of a base class, which fires the hooks again: torch patches each class."""
    return any(getattr(vars(base).get("step"), "hooked", False) for base in type(optimizer).__mro__[1:])
