"""A frozen model that the trained one learns from: what both make of the same inputs, once a forward of the student."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from ovit_engine.distributed.comm import digest
from ovit_engine.distributed.sharding import is_shard
from ovit_engine.masking.parameters import clean_name, parameter_slots, unwrapped
from ovit_engine.utils.autograd import is_recomputed
from ovit_engine.utils.copying import copy_model

TOKENS = "norm"  # of timm's vision transformers: the last layer that sees all tokens


class ModelOutput(NamedTuple):
    """What a model made of a batch: its output, and its patch tokens [B, N, C] after the final norm if watched."""

    output: Any
    tokens: Tensor | None


class OutputPair(NamedTuple):
    """The answers of student and teacher to the same inputs; the teacher's have no gradient."""

    student: ModelOutput
    teacher: ModelOutput


def logits_of(output: Any) -> Tensor:
    """The logits [B, K] in a model's output: itself, `.logits` (Hugging Face), or the mean of several heads (DeiT).

    Raises:
        TypeError: none of these.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    heads = [each for each in output if isinstance(each, Tensor)] if isinstance(output, (tuple, list)) else []
    if heads and len(heads) == len(output) and len({head.shape for head in heads}) == 1:
        return torch.stack(heads).mean(0)
    raise TypeError(f"no logits in a model's output of type {type(output).__name__}: a tensor or .logits is expected")


class Teacher:
    """Answers what the student was last asked in training; at most once a forward, and only if somebody asks.

    The teacher is in eval mode, without gradients, and on the device of the inputs. It is no part of the student: not
    of its parameters, its state, or copies of it. It must stay the same during training, resumed or not.

    Args:
        student: the model that is trained, before it is compiled or wrapped.
        module: the teacher, which is frozen; None: a copy of the student as it is now.

    Raises:
        ValueError: a teacher that has parameters of the student, or no weights yet.
    """

    def __init__(self, student: nn.Module, module: nn.Module | None = None) -> None:
        self.module = _copy_without_gradients(student) if module is None else module
        self._is_copy, self._is_known = module is None, False
        own = {id(parameter) for parameter in student.parameters()}
        if any(id(parameter) in own for parameter in self.module.parameters()):
            raise ValueError("the teacher shares parameters with the model that learns from it: give a copy")
        if not any(parameter.is_meta for parameter in student.parameters()):  # of one without weights it is a plan
            self._check_weights()
        self.module.eval().requires_grad_(False)
        self._student = student
        self._watch = _StudentHooks()
        self._handles: list[RemovableHandle] = [
            student.register_forward_pre_hook(self._watch.on_call, with_kwargs=True),
            student.register_forward_hook(self._watch.on_output),
        ]
        self._tokens: str | None = None
        (self._ask,) = map(
            torch.compiler.disable, [self._run_teacher]
        )  # a step that is compiled does not hold the teacher

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the teacher's weights and buffers. Where it is sharded all processes must ask at the same time."""
        found = blake2b(digest_size=16)
        for name, tensor in unwrapped(self.module).state_dict().items():
            found.update(f"{clean_name(name)} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(digest(tensor))
        return found.hexdigest()

    def watch_tokens(self) -> None:
        """Have lessons hold tokens too. At PREPARE.

        Raises:
            ValueError: a model without a module `norm`, whose outputs they are, or one that norms their mean instead.
        """
        if self._tokens is not None:
            return
        for model, whose in ((self._student, "the model"), (unwrapped(self.module), "the teacher")):
            last = getattr(model, TOKENS, None)
            if not isinstance(last, nn.Module):
                raise ValueError(f"{whose} ({type(model).__name__}) has no final norm {TOKENS!r} to read tokens from")
            if isinstance(last, nn.Identity):
                raise ValueError(
                    f"{whose} ({type(model).__name__}) norms the mean of its tokens (fc_norm) and not each of them, so "
                    "there are none after a norm to learn: leave 'tokens' out"
                )
        norm: nn.Module = self._student.get_submodule(TOKENS)
        self._handles.append(norm.register_forward_hook(self._watch.on_tokens))
        self._tokens = TOKENS

    def outputs(self) -> OutputPair | None:
        """Answers to the inputs of the student's last forward in training; None where there is none that is new."""
        seen = self._watch.seen
        if seen is None or not seen.is_answered:
            return None
        if seen.outputs is None:
            student = ModelOutput(seen.output, _patches(self._student, seen.tokens))
            seen.outputs = OutputPair(student, self._ask(seen))
        return seen.outputs

    def forget(self) -> None:
        """Let go of the student's last forward: what was taught about it is in the loss."""
        self._watch.seen = None

    def release(self) -> None:
        """Take the hooks from the student: nothing is taught any more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()

    def check(self, fingerprint: object) -> None:
        """Raise ValueError where training began with another teacher."""
        if fingerprint != self.fingerprint:
            what = "without a teacher" if fingerprint is None else "with another teacher"
            raise ValueError(
                f"the engine state was saved {what}: give the Engine the same one (teacher=...); where it is the "
                "model as training began, load those weights before engine.prepare()"
            )
        self._is_known = True

    def _check_weights(self) -> None:
        if any(parameter.is_meta for parameter in self.module.parameters()):
            raise ValueError("the teacher has no weights yet (meta device): load them before engine.prepare()")

    def check_student(self) -> None:
        """Raise where the teacher has no weights (ValueError), or the student others than it was copied with."""
        self._check_weights()
        if not self._is_copy or self._is_known:
            return
        weights = self.module.state_dict()
        for slot in parameter_slots(self._student):
            copy, own = weights.get(slot.name), slot.tensor.detach()
            if copy is not None and not is_shard(own) and not torch.equal(copy.to(own), own):
                raise RuntimeError(
                    f"{slot.name!r} changed after engine.prepare(), where the teacher was copied from the model: load "
                    "weights before engine.prepare(), or give Engine(..., teacher=...)"
                )

    @torch.no_grad()
    def _run_teacher(self, seen: "_Seen") -> ModelOutput:
        if seen.versions and _versions(seen.args, seen.kwargs) != seen.versions:
            raise RuntimeError(
                "an input of the model was changed in place since its forward pass began, so the teacher would see "
                "another: let the model work on a copy (x = x.clone())"
            )
        inputs = _inputs_for(self.module, (seen.args, seen.kwargs))
        tokens: list[Tensor] = []
        handles = []
        if self._tokens is not None:
            norm = unwrapped(self.module).get_submodule(self._tokens)
            handles.append(norm.register_forward_hook(lambda module, args, output: tokens.append(output)))
        is_mixed, dtype = seen.autocast
        try:
            with torch.autocast(seen.device_type, dtype=dtype, enabled=is_mixed):
                output = self.module(*inputs[0], **inputs[1])
        finally:
            for handle in handles:
                handle.remove()
        return ModelOutput(output, _patches(unwrapped(self.module), tokens[-1] if tokens else None))


def forget_teacher(model: nn.Module) -> None:
    """Take from `model`, a copy of a student, the hooks that came along with the copy."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [
                key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _StudentHooks)
            ]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


@dataclass
class _Seen:
    """A forward of the student in training."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device_type: str
    autocast: tuple[bool, torch.dtype]
    output: Any = None
    tokens: Tensor | None = None
    outputs: OutputPair | None = None
    is_answered: bool = False
    versions: tuple[int, ...] = ()  # of the input tensors, counted up where one is changed in place


class _StudentHooks:
    """Hooks on the student. Its copies, and those of the model it hangs on, have seen nothing."""

    def __init__(self) -> None:
        self.seen: _Seen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"seen": None}

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_recomputed() or not _is_training(module):  # an evaluation between a forward and its loss changes nothing
            return
        self.seen = None
        device = next((leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), "cpu")
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.seen = _Seen(args, kwargs, device, autocast, versions=_versions(args, kwargs))

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.seen is not None and _is_training(module) and not is_recomputed():
            self.seen.output, self.seen.is_answered = output, True

    def on_tokens(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # grad is off where reentrant checkpointing runs the first time: those tokens would teach nothing
        if self.seen is None or self.seen.is_answered:
            return
        if torch.is_grad_enabled() and not is_recomputed():
            self.seen.tokens = output


def _is_training(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    if torch.compiler.is_compiling():
        return ()
    return tuple(leaf._version for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))


@torch.no_grad()
def _copy_without_gradients(model: nn.Module) -> nn.Module:
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in grads:
        parameter.grad = None
    try:
        return copy_model(model)
    finally:
        for parameter, grad in grads:
            parameter.grad = grad


def _patches(model: nn.Module, tokens: Tensor | None) -> Tensor | None:
    """Return the tokens [B, P + N, C] or [B, H, W, C] without the P prefix ones (class token, registers), [B, N, C]."""
    prefix = getattr(model, "num_prefix_tokens", 0)
    return None if tokens is None or tokens.ndim < 3 else tokens.flatten(1, -2)[:, prefix:]


def _inputs_for(model: nn.Module, inputs: Any) -> Any:
    """`inputs` in the precision of `model`, which is moved to where they are."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None or not tensors:
        return inputs
    if weight.device != tensors[0].device:
        model.to(tensors[0].device)
    dtype = weight.dtype
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, inputs
    )
