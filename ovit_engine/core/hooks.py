"""The hooks on a user's optimizer, closure and model."""

import inspect
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ovit_engine.core.capabilities import Surgical, having
from ovit_engine.core.modifier import Modifier
from ovit_engine.core.optimizers import nests
from ovit_engine.core.run import Run
from ovit_engine.masking.parameters import Mark, unwrapped

_WRAPPER = inspect.getsourcefile(Optimizer)  # where torch wraps `step`


class Attachment(Mark):
    """The mark of an attached engine; where the loop loads a state into the model, masks and phases stay in force."""

    def __init__(self, model: nn.Module, run: Run, modifiers: Sequence[Modifier]) -> None:
        super().__init__(model)
        whole = unwrapped(model)
        reload = _Reload(whole, run, modifiers)
        self._handles = [
            handle
            for module in whole.modules()  # a part may be loaded alone
            for handle in (
                module.register_load_state_dict_pre_hook(reload.begin),  # type: ignore[no-untyped-call]
                module.register_load_state_dict_post_hook(reload.end),  # type: ignore[no-untyped-call]
            )
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        super().remove()


class _Reload:
    """The hooks around `load_state_dict` of the model or of a part of it; those of a copy of the model do nothing."""

    def __init__(
        self, whole: nn.Module | None = None, run: Run | None = None, modifiers: Sequence[Modifier] = ()
    ) -> None:
        self._whole, self._run, self._modifiers = whole, run, modifiers
        # whose `load_state_dict` runs: the hooks of the modules inside it come too
        self._called: nn.Module | None = None

    def __reduce__(self) -> tuple[type["_Reload"], tuple[()]]:
        return _Reload, ()

    def begin(self, module: nn.Module, state: object, prefix: str, *others: object) -> None:
        if not prefix:
            self._called = module

    def end(self, module: nn.Module, keys: object) -> None:
        if self._run is not None and (module is self._called or module is self._whole):
            self._called = None
            self._run.masks.project()
            for modifier in having(self._modifiers, Surgical):
                modifier.reloaded(self._run)


class StepHooks:
    """The two hooks on the clock optimizer. They distinguish an applied step from one that is skipped or nested.

    Args:
        run: whose gradient scale is set before a step.
        write: called first before each applied step, before a closure runs.
        begin: called once gradients are there: then, or after a closure's first evaluation.
        end: called after each applied step.
    """

    def __init__(
        self, run: Run, *, write: Callable[[], None], begin: Callable[[], None], end: Callable[[], None]
    ) -> None:
        self._run, self._write, self._begin, self._end = run, write, begin, end
        self._skipped = False
        self._depth = 0  # of calls of `step` inside one another
        self._outermost: FrameType | None = None

    def register(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Register both on `optimizer`."""
        # a compiled step calls its hooks, but is not compiled together with them
        before, after = map(torch.compiler.disable, (self._before, self._after))
        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def hold_after(self, optimizer: Optimizer) -> RemovableHandle:
        """Apply the masks after each step of another optimizer, or of a wrapper, whose steps are not counted."""
        return optimizer.register_step_post_hook(torch.compiler.disable(self._after_other))  # type: ignore[no-untyped-call]

    @staticmethod
    def are_on(optimizer: Optimizer) -> bool:
        """Return whether an engine is attached to `optimizer`."""
        hooks = optimizer._optimizer_step_pre_hooks.values()
        return any(isinstance(getattr(inspect.unwrap(hook), "__self__", None), StepHooks) for hook in hooks)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if nests(optimizer):
            if self._depth and not self._is_running():  # a step that raised never came to its end
                self._depth = 0
            self._depth += 1
            if self._depth > 1:
                return None
            self._outermost = _step_call()
        # A fused optimizer steps under GradScaler even when it will skip, with gradients still scaled.
        found_inf = getattr(optimizer, "found_inf", None)
        self._skipped = found_inf is not None and bool(found_inf)
        scale = getattr(optimizer, "grad_scale", None)
        self._run.grad_scale = 1.0 if scale is None else scale
        if self._skipped:
            self._run.skip_step(seen=True)
            return None
        self._write()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._begin()
            return None
        others = {key: value for key, value in kwargs.items() if key != "closure"}
        return (args[0], MaskedClosure(self._run, closure, self._begin), *args[2:]), others

    def _is_running(self) -> bool:
        """Return whether the outermost call of `step` is not over yet.

        Torch runs no hook when a step raises, and hands hooks nothing that lives as long as the call: a traceback that
        somebody keeps holds its arguments. So the stack is the only witness.
        """
        return self._outermost is None or any(
            frame is self._outermost for frame, _ in traceback.walk_stack(inspect.currentframe())
        )

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._depth:
            self._depth -= 1
            if self._depth:
                return
            self._outermost = None
        if not self._skipped:
            self._end()

    def _after_other(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._run.masks.project()


def _step_call() -> FrameType | None:
    """Return the call of `step` that runs the present hook; None if torch did not make it in its own wrapper."""
    return next(
        (frame for frame, _ in traceback.walk_stack(inspect.currentframe()) if frame.f_code.co_filename == _WRAPPER),
        None,
    )


class MaskedClosure:
    """A user's closure under the masks: LBFGS evaluates it several times inside one step.

    `begin` is called once, after the first evaluation, when gradients are still dense: pruners want them so.
    """

    def __init__(self, run: Run, closure: Any, begin: Callable[[], None]) -> None:
        self._run, self._closure, self._begin, self._first = run, closure, begin, True

    def __call__(self) -> Any:
        self._run.masks.project()
        with torch.enable_grad():
            loss = self._closure()
        if self._first:
            self._begin()
            self._first = False
        self._run.masks.project_gradients()
        return loss
