"""What the engine refuses: surgery that comes too late, two writers of one thing."""

import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from ovit_engine.core.capabilities import Claim, Distillation, Exclusive, Surgical, having
from ovit_engine.core.modifier import Modifier
from ovit_engine.core.optimizers import is_of_deepspeed, wrapping
from ovit_engine.core.recipe import Recipe
from ovit_engine.core.run import Run
from ovit_engine.distributed.sharding import is_sharded, sharded_modules
from ovit_engine.masking.parameters import Slot, clean_name, unwrapped

_BEFORE_COMPILATION = (Surgical, Distillation)  # what they hook into a compiled model is not seen


def check_made(model: object, recipe: object) -> None:
    """Raise TypeError for what no engine can be made of."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(recipe, (Recipe, str, Path)):
        raise TypeError(f"recipe must be a Recipe, a path or a name, not {type(recipe).__name__}")
    check_supported(model)


def check_arguments(optimizers: Iterable[object], criterion: object, ema: object, evaluate: object) -> None:
    """Raise TypeError for what `attach` can't work with, before anything is done."""
    for each in optimizers:
        if is_of_deepspeed(type(each)):
            raise TypeError(f"{type(each).__name__} of DeepSpeed keeps weights in flat buffers: {_INSTEAD}")
        if getattr(each, "_overlap_with_ddp", False):
            raise TypeError(
                "ZeroRedundancyOptimizer(overlap_with_ddp=True) has no step to follow: leave the option out"
            )
        if not isinstance(each, Optimizer):
            kind = type(each).__name__
            raise TypeError(f"attach needs a torch optimizer, not {kind}: of a wrapper, give the inner one")
    if criterion is not None and not isinstance(criterion, nn.Module):
        raise TypeError(
            f"criterion must be a module such as nn.CrossEntropyLoss(), not {type(criterion).__name__}; "
            "with a function, write loss = engine.loss(loss) in the loop"
        )
    if ema is not None and not isinstance(ema, nn.Module):
        raise TypeError(f"ema must be an averaged copy of the model, not {type(ema).__name__}")
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate must be a function of the model, not {type(evaluate).__name__}")


def check_teacher(teacher: object, model: nn.Module, modifiers: Iterable[Modifier]) -> None:
    """Raise for a teacher that is no other model, or that no modifier learns from."""
    if teacher is None:
        return
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a torch.nn.Module, not {type(teacher).__name__}")
    if unwrapped(teacher) is unwrapped(model):
        raise ValueError("the teacher is the model itself: leave it out for a copy of the model as training begins")
    if not having(modifiers, Distillation):
        raise ValueError("a teacher was given, and no modifier of the recipe learns from one: add 'distill'")


def check_supported(model: nn.Module) -> None:
    """Raise TypeError for a model whose parameters other software has put into flat buffers of its own."""
    found = None
    modules = list(model.modules())
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in modules):
        found = "FSDP1 (FullyShardedDataParallel)"
    elif "_is_fsdp_managed_module" in vars(model) and not is_sharded(model) and not sharded_modules(model):
        found = "FSDP1 (FullyShardedDataParallel)"  # the wrapper is outside, and the model holds views of a flat buffer
    elif any(is_of_deepspeed(type(module)) for module in modules):
        found = "DeepSpeed's engine"
    elif any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        found = "DeepSpeed ZeRO"
    if found is not None:
        raise TypeError(f"the model is in {found}, where no weight can be masked: {_INSTEAD}")


def check_parameters(model: nn.Module, held: Collection[int], new: Iterable[Slot]) -> None:
    """Raise where optimizers hold no parameter of this model, by id, or lack those that PREPARE made."""
    if not any(id(parameter) in held for parameter in model.parameters()):
        why = (
            "it was made before fully_shard, which replaces them"
            if is_sharded(model)
            else "was it made for a copy of it?"
        )
        raise ValueError(f"the optimizer holds no parameter of this model: {why}")
    if any(id(slot.tensor) not in held for slot in new):  # as they are now: fully_shard replaces them
        raise RuntimeError(
            "the recipe adds parameters that the optimizer lacks: call engine.prepare() before making it"
        )


def check_device(model: nn.Module, device: torch.device | None) -> None:
    """Raise RuntimeError where the model's first parameter is not where it was at attach."""
    now = next((parameter.device for parameter in model.parameters()), None)
    if now != device:
        raise RuntimeError(
            f"the model moved from {device} to {now} after engine.attach, and masks, scores and the optimizer did not: "
            "move it before the optimizer is made"
        )


def check_surgery(model: nn.Module, modifiers: Iterable[Modifier]) -> None:
    """Raise where the recipe changes the model and that is wrapped already: the wrapper would not see it."""
    needs = [
        (m.name, "replaces layers" if isinstance(m, Surgical) else "needs a teacher")
        for m in modifiers
        if isinstance(m, _BEFORE_COMPILATION)
    ]
    if needs and (late := wrapping(model)):
        name, does = needs[0]
        raise RuntimeError(f"{name} {does}, and the model is {late} already: call engine.prepare() before that line")


def forget_compiled(modifiers: Iterable[Modifier]) -> None:
    """Let functions that were compiled around the model be compiled again: nothing tells of them.

    Guards of torch 2.11 do not see that a module's class changes; those of 2.15 do.
    """
    if "torch._dynamo" in sys.modules and any(isinstance(modifier, _BEFORE_COMPILATION) for modifier in modifiers):
        torch.compiler.reset()


_INSTEAD = "use DistributedDataParallel or FSDP2 (torch.distributed.fsdp.fully_shard)"


def check_copy(copy: nn.Module, model: nn.Module) -> nn.Module:
    """`copy`, if it has all that `model` has; ValueError for a copy of another model, or of before `prepare`."""
    shapes = {clean_name(name): tensor.shape for name, tensor in copy.state_dict().items()}
    for name, tensor in unwrapped(model).state_dict().items():
        found = shapes.get(clean_name(name))
        if found is None:
            raise ValueError(f"the EMA copy lacks {name!r}, which the model has: make the copy after engine.prepare()")
        if found != tensor.shape:
            raise ValueError(f"{name!r} of the EMA copy is {list(found)}, of the model {list(tensor.shape)}")
    return copy


def check_claims(modifiers: Iterable[Modifier], run: Run) -> None:
    """Raise where at overlapping times two modifiers write one thing, or one writes what another needs left alone."""
    before: list[tuple[Modifier, Claim]] = []
    for second in having(modifiers, Exclusive):
        claims = list(second.claims(run))
        for later in claims:
            for first, earlier in before:
                _check_pair(first, earlier, second, later)
        before += [(second, claim) for claim in claims]


def _check_pair(first: Modifier, earlier: Claim, second: Modifier, later: Claim) -> None:
    if (earlier.resource, earlier.name) != (later.resource, later.name) or (earlier.reason and later.reason):
        return
    if earlier.start <= later.end and later.start <= earlier.end:
        where = first.origin() or "same recipe"
        if reason := later.reason or earlier.reason:
            raise second.error(
                f"{later} from step {later.start} to {later.end} does not go with {first.name} ({where}) "
                f"from {earlier.start} to {earlier.end}: {reason}"
            )
        raise second.error(
            f"writes {later} from step {later.start} to {later.end}, where {first.name} ({where}) writes "
            f"it from {earlier.start} to {earlier.end}"
        )
