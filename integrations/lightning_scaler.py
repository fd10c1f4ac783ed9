"""Lightning: steps that the gradient scaler of a Trainer skips are counted."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from ovit_engine.integrations.skipped_steps import SkippedSteps


class ScalerCallback(Callback):
    """Tells `skips` of each step of the first optimizer, where there is a scaler; manual optimization too."""

    skips: SkippedSteps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if optimizer is trainer.optimizers[0] and getattr(trainer.precision_plugin, "scaler", None) is not None:
            self.skips.begin()

    def on_train_batch_end(self, *args: Any) -> None:
        self.skips.end()  # before a checkpoint of this step is written
