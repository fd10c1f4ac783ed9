"""Which forward passes may still be run again: gradient checkpointing does so in backward, and must find what was."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Passes:
    """Forward passes in training since a backward pass began; one whose outputs nobody holds any more is forgotten.

    What hooks keep of a pass is overwritten by the next one, so only the last can be run again.
    """

    def __init__(self) -> None:
        self._open: list[Callable[[], object]] = []  # each gives None once its graph is gone
        self._trained = False  # whether the last one that may have a backward pass was one of training

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": [], "_trained": False}

    def begin(self, x: Tensor, *, training: bool) -> Tensor:
        """Note a forward pass that comes with `x`; what it must go on with."""
        # reentrant checkpointing runs the first time without gradients, on what requires one
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or x.requires_grad):
            return x
        self._trained = training
        if not training:
            return x
        self._open = [each for each in self._open if each() is not None]  # nobody may ever ask, nor end a step
        marker = _Marker()
        marked: Tensor = _Mark.apply(x, marker)
        if marked.grad_fn is not None:
            self._open.append(weakref.ref(marker))
        elif self._open[-2:] != [_unknown, _unknown]:  # of three no more would be known than of two
            self._open.append(_unknown)
        return marked

    def begin_step(self) -> None:
        """No backward pass is to come of what was before."""
        self._open = []

    def check_mode(self, *, training: bool) -> None:
        """A block is run again, in backward. RuntimeError where it was run in training mode and is in eval mode now."""
        if self._trained and not training:
            raise RuntimeError(
                "gradient checkpointing runs a block again in eval mode, and its forward pass was one of training: "
                "call model.eval() after backward"
            )

    def check_last(self, what: str) -> None:
        """Raise RuntimeError where the pass that is run again in training need not be the last one."""
        left = [each for each in self._open if each() is not None]
        if self._open and left != self._open[-1:]:
            raise RuntimeError(
                f"gradient checkpointing of {what} needs backward after each forward pass in training mode; of one "
                "that gets none, let go of the outputs and the loss before the next backward"
            )
        self._open = []


def _unknown() -> bool:
    """Of a pass without a graph here: nothing tells how long it may still be run again."""
    return True


class _Marker:
    """Lives as long as the graph of a forward pass."""


class _Mark(torch.autograd.Function):
    generate_vmap_rule = True  # gradients of single images by torch.func

    @staticmethod
    def forward(x: Tensor, marker: _Marker) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Marker], output: Tensor) -> None:
        ctx.marker = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
