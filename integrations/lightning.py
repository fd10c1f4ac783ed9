"""Lightning: `Trainer(callbacks=[RecipeCallback(recipe)])` trains under a recipe."""

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import Optimizer

from ovit_engine.core.recipe import Recipe
from ovit_engine.core.skipped_steps import SkippedSteps
from ovit_engine.engine import Engine
from ovit_engine.gradients.backward import LossFunction
from ovit_engine.gradients.calibration import Calibration


class ScalerCallback(Callback):
    """Tells `skips` of each step of the first optimizer, where there is a scaler; manual optimization too."""

    skips: SkippedSteps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if optimizer is trainer.optimizers[0] and getattr(trainer.precision_plugin, "scaler", None) is not None:
            self.skips.begin()

    def on_train_batch_end(self, *args: Any) -> None:
        self.skips.end()  # before a checkpoint of this step is written


class RecipeCallback(ScalerCallback):
    """Applies a recipe to the model that a Lightning Trainer fits; afterwards `callback.engine.export(...)`.

    The engine prepares in `setup`, before strategy and optimizers are made: build the network in `__init__` (not in
    `configure_model`), and the training data so that its length is known by then (a LightningDataModule's `setup` is
    early enough, the LightningModule's is not). The first optimizer is the clock. Validation metrics reach
    `engine.metric`, what the engine measures the Trainer's loggers, and checkpoints hold the engine's state: go on with
    `trainer.fit(..., ckpt_path=...)`.

    Args:
        recipe: a Recipe, a path, or the name of one of ours.
        calibration: the source of gradients for second-order pruners. A loss function of (outputs, targets) stands for
            it on the Trainer's own training data, whose batches must then be (inputs, targets).
        network: name of the attribute that holds the network, where it is not the LightningModule itself. Targets are
            then named from there on, and it is what is exported.
        criterion: name of the attribute that holds the loss module, which gets the extra loss terms of a recipe
            (`distill`). Without one write `loss = callback.engine.loss(loss)` in `training_step`.
        teacher: what `distill` learns from; a copy of the network as training starts if left out.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        *,
        calibration: Calibration | LossFunction | None = None,
        network: str = "",
        criterion: str | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.recipe, self.calibration, self.network = recipe, calibration, network
        self.criterion, self.teacher = criterion, teacher
        self._engine: Engine | None = None
        self._fitting = False

    @property
    def engine(self) -> Engine:
        """The engine. Raises RuntimeError before `trainer.fit`, which tells how long training is."""
        if self._engine is None:
            raise RuntimeError("the engine is made by trainer.fit, which knows how long training is: not called yet")
        return self._engine

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        if self._engine is not None:
            raise RuntimeError("this RecipeCallback was in a fit before: make a new one for each")
        steps_per_epoch, total_steps = training_length(trainer)
        network = pl_module.get_submodule(self.network)
        length: Any = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        self._engine = Engine(network, self.recipe, **length, teacher=self.teacher).prepare()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        calibration = self.calibration
        if calibration is not None and not isinstance(calibration, Calibration):
            loader: Any = trainer.train_dataloader
            calibration = Calibration(loader, calibration)
        for logger in trainer.loggers:
            self.engine.log_to(logger.log_metrics, every=max(1, trainer.log_every_n_steps))  # type: ignore[attr-defined]
        criterion = None if self.criterion is None else pl_module.get_submodule(self.criterion)
        self.engine.attach(*trainer.optimizers, calibration=calibration, criterion=criterion)
        self.skips = SkippedSteps(self.engine.run)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fitting and self.engine.is_attached:  # not yet where Lightning checks its sanity
            for name, value in trainer.callback_metrics.items():
                self.engine.metric(name, float(value))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.engine.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._engine is not None:
            self._engine.__exit__(type(exception), exception, None)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._engine is None else self._engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fitting:  # a finished engine stays as it is where a checkpoint is tested
            self.engine.load_state_dict(state_dict)


def training_length(trainer: Trainer) -> tuple[int, int]:
    """Return the steps of an epoch and of a fit. Raises ValueError if the Trainer does not know when it ends."""
    trainer.fit_loop.setup_data()  # makes the loader; Lightning does so by itself only where epochs end training
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        raise ValueError("the Trainer does not know when training ends: give it max_steps, or data that has a length")
    batches = trainer.num_training_batches
    steps = total if batches == math.inf else math.ceil(batches / trainer.accumulate_grad_batches)
    return int(steps), int(total)
