"""FakeQuantize: one tensor's quantizer in training form, all of its state in buffers."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ovit_engine.quant.functional import IntegerGrid, choose_qparams, fake_quantize
from ovit_engine.quant.observers import Observer
from ovit_engine.utils.autograd import is_recomputed


class FakeQuantize(nn.Module):
    """Rounds a tensor to the grid that the deployed integer kernel will use.

    Installed disabled, when it is the identity. `enabled`, `observing` and `observed` are tensors: flipping one
    makes no compiled graph compile again, and checkpoints and EMA copies carry them. Works in float32 inside autocast.
    It rounds only once it has observed a tensor: an enabled quantizer without a range would destroy the signal.
    """

    scale: Tensor
    zero_point: Tensor
    minimum: Tensor
    maximum: Tensor
    enabled: Tensor
    observing: Tensor
    observed: Tensor

    def __init__(
        self,
        grid: IntegerGrid,
        observer: Observer,
        *,
        axis: int | None = None,
        channels: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        """With `axis` and its number of `channels` there is one scale for each index along `axis`, otherwise one."""
        super().__init__()
        self.grid, self.observer, self.axis = grid, observer, axis
        shape = () if channels is None else (channels,)
        self.register_buffer("scale", torch.ones(shape, device=device))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32, device=device))
        for limit in ("minimum", "maximum"):
            self.register_buffer(limit, torch.zeros(shape, device=device))
        for flag in ("enabled", "observing", "observed"):
            self.register_buffer(flag, torch.zeros((), dtype=torch.bool, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded to the grid, same shape and dtype."""
        # On the CPU a flag costs nothing to read; on CUDA it would wait for the device, in a compiled graph break it.
        readable = not torch.compiler.is_compiling() and self.enabled.device.type == "cpu"
        # what is recomputed must come out as before: an observer that followed a tensor twice would have moved on
        watching = (self.training or not self.observer.only_in_training) and not is_recomputed()
        if watching and not (readable and not self.observing):
            self.observe(x)
        if readable and not (self.enabled and self.observed):
            return x
        active = self.enabled & self.observed
        rounded = fake_quantize(x.float(), self.scale, self.zero_point, self.grid, axis=self.axis, active=active)
        return rounded.to(x.dtype)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Let the range follow `x` if `observing`.

        A tensor with NaN or infinity is not taken: mixed precision overflows now and then, the step is skipped by the
        gradient scaler, and a moving average would never recover.
        """
        low, high = self.observer.update(x.detach().float(), self.minimum, self.maximum, self.observed, self.axis)
        take = self.observing & torch.isfinite(low).all() & torch.isfinite(high).all()
        self.minimum.copy_(torch.where(take, low, self.minimum))
        self.maximum.copy_(torch.where(take, high, self.maximum))
        scale, zero_point = choose_qparams(self.minimum, self.maximum, self.grid)
        self.scale.copy_(torch.where(take, scale, self.scale))
        self.zero_point.copy_(torch.where(take, zero_point, self.zero_point))
        self.observed.logical_or_(take)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Ranges stay float32 in a model that is made half precise: in float16 a small scale is zero."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(buffer.device)
        return self

    def extra_repr(self) -> str:
        where = "per tensor" if self.axis is None else f"per channel of axis {self.axis}"
        return f"[{self.grid.low}, {self.grid.high}] {where}, {self.observer}"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """A checkpoint made before surgery has none of our keys: that is no error, the quantizer stays as it is."""
        if any(prefix + name in state_dict for name in self._buffers):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
