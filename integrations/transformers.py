"""Hugging Face Transformers: `RecipeTrainerCallback(trainer, recipe)`, then `trainer.train()` as before."""

import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ovit_engine.calibration import Calibration
from ovit_engine.engine import Engine
from ovit_engine.export import Certificate
from ovit_engine.integrations.keyword_batches import AddToOwnLoss, KeywordCalibration, deployed, positional
from ovit_engine.integrations.lengths import transformers_length
from ovit_engine.integrations.transformers_state import packed, unpack
from ovit_engine.integrations.transformers_trainer import TrainerLog, check_arguments, keep_names, keep_rates
from ovit_engine.recipe import Recipe


class RecipeTrainerCallback(TrainerCallback, ExportableState):
    """Applies a recipe to the model that a Trainer trains, and adds itself to the Trainer.

    Make it before `trainer.train()`, in a resumed run too: surgery on the model comes before checkpoint and optimizer.
    Checkpoints hold the engine's state inside trainer_state.json. Where the recipe writes the learning rate, the
    Trainer makes no scheduler, and logs the rate that is used. Evaluation metrics reach `engine.metric`.

    Args:
        calibration: the source of gradients for second-order pruners; without it the model's own loss on the training
            data.
        teacher: what `distill` learns from; a copy of the model as it is now if left out.

    Raises:
        ValueError: training arguments that a recipe can't be followed with.
    """

    def __init__(
        self,
        trainer: Trainer,
        recipe: Recipe | str | Path,
        *,
        calibration: Calibration | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        check_arguments(trainer)
        self._trainer, self._calibration = trainer, calibration
        steps_per_epoch, total_steps = transformers_length(trainer.args, trainer.get_train_dataloader())
        model: Any = trainer.model
        length: Any = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        self.engine = Engine(model, recipe, **length, teacher=teacher).prepare()
        keep_names(model)
        keep_rates(self.engine, trainer)
        self._log = TrainerLog(self.engine, trainer)
        trainer.add_callback(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:
            unpack(self.engine, state, type(self).__name__)
        loader = kwargs["train_dataloader"]
        calibration = self._calibration or KeywordCalibration(loader.dataset, loader.collate_fn)
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self.engine.attach(optimizer, calibration=calibration)
        # after the hooks of prepare, which read the output
        self._terms = self.engine.model.register_forward_hook(AddToOwnLoss(self.engine), with_kwargs=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.engine.run.skipped += self._trainer.accelerator.optimizer_step_was_skipped
        self._log.flush(control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        for name, value in (metrics or {}).items() if self.engine.is_attached else ():
            if isinstance(value, (int, float)) and not name.endswith(("_runtime", "_per_second", "epoch")):
                self.engine.metric(name, value)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._terms.remove()
        self.engine.detach()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": packed(self.engine)}

    def export(self, path: str | Path) -> Certificate:
        """Write the deployable ONNX file and its certificate, verified on the Trainer's evaluation data.

        The inputs of the file are those of its batches, labels left out, in their order; the output is the logits.

        Raises:
            ExportError: what the file fails of its promise.
        """
        names, data = positional(self._trainer.get_eval_dataloader())
        model = deployed(copy.deepcopy(self.engine.model), names)
        return self.engine.export(path, data[0][0], model=model, data=data)
