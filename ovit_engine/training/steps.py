"""One optimizer step of the bundled trainer: parts of a batch, mixed precision, mixed images, clipping, the average."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ovit_engine.core.skipped_steps import SkippedSteps
from ovit_engine.core.training_options import Training
from ovit_engine.engine import Engine


def mixed_precision(device: torch.device) -> tuple[torch.dtype, bool]:
    """Return the type in which a device computes under `amp`, and whether gradients must be scaled to fit into it."""
    return (torch.float16, True) if device.type == "cuda" else (torch.bfloat16, False)


class Steps:
    """Makes the steps of a training.

    Args:
        network: the model, or the wrapper of several processes around it.
        amp: compute in float16 with scaled gradients on a GPU, in bfloat16 on a CPU.
    """

    def __init__(
        self,
        training: Training,
        engine: Engine,
        network: nn.Module,
        optimizer: Optimizer,
        *,
        device: torch.device,
        mixup: Mixup | None,
        scheduler: Scheduler | None,
        ema: ModelEmaV3 | None,
        amp: bool,
    ) -> None:
        self._training, self._engine, self._network, self._optimizer = training, engine, network, optimizer
        self._device, self._mixup, self._scheduler, self._ema, self._amp = device, mixup, scheduler, ema, amp
        self._dtype, scales = mixed_precision(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp and scales)
        self._skips = SkippedSteps(engine.run)

    def __call__(self, parts: Iterable[Any], number: int) -> Tensor:
        """Make step `number` of the training, which counts from 0; its mean loss."""
        if self._scheduler is not None:
            self._scheduler.step_update(number)
        total = torch.zeros((), device=self._device)
        self._optimizer.zero_grad()
        for part, (images, labels) in enumerate(parts, start=1):
            last = part == self._training.accumulate
            waits = isinstance(self._network, DistributedDataParallel) and not last
            with self._network.no_sync() if waits else nullcontext():  # type: ignore[operator]
                loss = self.loss(images.to(self._device), labels.to(self._device)) / self._training.accumulate
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if self._training.clip_grad is not None:
            self.scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._engine.model.parameters(), self._training.clip_grad)
        self._skips.begin()
        self.scaler.step(self._optimizer)
        self.scaler.update()
        is_skipped = self._skips.end()
        if self._ema is not None and not is_skipped:
            self._ema.update(self._engine.model, step=self._engine.run.step)
        return total

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss to differentiate, of images [N, C, H, W] and classes [N]."""
        smoothing = self._training.label_smoothing
        if self._mixup is not None:
            images, labels = self._mixup(images, labels)
            smoothing = 0.0  # the soft labels are smoothed
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._amp):
            return self._engine.loss(cross_entropy(self._network(images), labels, label_smoothing=smoothing))
