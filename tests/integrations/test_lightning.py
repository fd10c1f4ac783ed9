"""Lightning's own Trainer under a recipe."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from ovit_engine import Calibration, Engine, Recipe
from ovit_engine.integrations.lightning import RecipeCallback
from tests.integrations import small

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:Warning"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*smaller than the logging interval:Warning"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used:Warning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:Warning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:Warning"),
]


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = small.vit()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizer = small.RecordingAdamW(self.parameters(), lr=1e-3)
        return self.optimizer


class Digits(LightningDataModule):
    """Known only from its `setup` on, as data often is."""

    def setup(self, stage: str) -> None:
        self.train_data, self.val_data = small.TRAIN, small.VAL

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_data, batch_size=small.BATCH)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_data, batch_size=160)


def trainer(path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    options = {"max_epochs": small.EPOCHS, "logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=path,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def callback(**options: Any) -> RecipeCallback:
    return RecipeCallback(small.recipe(), **{"calibration": cross_entropy, "network": "net", **options})


def test_a_fit_ends_in_a_verified_file(tmp_path: Path) -> None:
    recipe, model = callback(), Classifier()
    trainer(tmp_path, recipe, gradient_clip_val=0.5).fit(model, datamodule=Digits())
    small.check_trained(recipe.engine)
    assert (recipe.engine.run.steps_per_epoch, recipe.engine.run.total_steps) == (10, 40)
    metrics = [(step, name) for step, name, _ in recipe.engine.run.history if name == "val_acc"]
    assert metrics == [(10 * epoch, "val_acc") for epoch in (1, 2, 3, 4)]
    certificate = recipe.engine.export(tmp_path / "model.onnx", small.IMAGES[:2], data=DataLoader(small.VAL, 64))
    assert certificate.accuracy is not None


def test_what_is_fitted_is_what_a_plain_loop_trains(tmp_path: Path) -> None:
    recipe, model = callback(), Classifier()
    trainer(tmp_path, recipe).fit(model, datamodule=Digits())
    other = small.vit()
    engine = Engine(other, small.recipe(), steps_per_epoch=10, epochs=4).prepare()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
    with engine.attach(optimizer, calibration=Calibration(small.TRAIN, cross_entropy)):
        for _ in range(4):
            for images, classes in DataLoader(small.TRAIN, batch_size=small.BATCH):
                optimizer.zero_grad()
                cross_entropy(other(images), classes).backward()
                optimizer.step()
    assert small.equal(model.net, other)


def test_accumulation_and_max_steps_count_optimizer_steps(tmp_path: Path) -> None:
    recipe = callback()
    # 10 batches in groups of 4 are 3 steps an epoch, and max_steps ends training within the tenth
    fit = trainer(tmp_path, recipe, accumulate_grad_batches=4, max_steps=28, max_epochs=-1)
    fit.fit(Classifier(), datamodule=Digits())
    assert (recipe.engine.run.steps_per_epoch, recipe.engine.run.total_steps) == (3, 28)
    small.check_trained(recipe.engine)


def test_resuming_from_a_checkpoint_is_bit_exact(tmp_path: Path) -> None:
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)

    unbroken = Classifier()
    trainer(tmp_path, callback(), keep(), enable_checkpointing=True).fit(unbroken, datamodule=Digits())
    for epoch in (0, 1, 2):
        recipe, resumed = callback(), Classifier()
        torch.manual_seed(99)
        fit = trainer(tmp_path, recipe, keep(), enable_checkpointing=True)
        fit.fit(resumed, datamodule=Digits(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert small.equal(resumed, unbroken), epoch
        small.check_trained(recipe.engine)


def test_logs_go_through_the_trainers_logger_with_the_rates_that_were_used(tmp_path: Path) -> None:
    recipe, model = callback(), Classifier()
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, recipe, logger=logger, log_every_n_steps=5).fit(model, datamodule=Digits())
    assert model.optimizer.rates == pytest.approx([small.lr_of(step) for step in range(1, 41)])
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    logged = {int(row["step"]): float(row["lr"]) for row in rows if row["lr"]}
    assert logged == {step: model.optimizer.rates[step - 1] for step in range(5, 41, 5)}
    sparsity = {int(row["step"]): float(row["sparsity"]) for row in rows if row["sparsity"]}
    assert (sparsity[10], sparsity[20]) == pytest.approx((0.3, 0.5), abs=1e-3)
    assert [row for row in rows if row["sparsity/blocks.0.attn.qkv.weight"]]
    assert [row for row in rows if row["ovit_prune/gradients_seconds"]]


def test_training_that_stops_early_says_that_the_recipe_did_not_end(tmp_path: Path) -> None:
    stop = EarlyStopping("val_acc", patience=0, mode="min", min_delta=10.0)
    recipe = callback()
    with pytest.raises(RuntimeError, match=r"training ended before .*the optimizer applied 20 of 40 steps"):
        trainer(tmp_path, recipe, stop).fit(Classifier(), datamodule=Digits())


def test_a_fit_that_fails_leaves_the_optimizer_clean(tmp_path: Path) -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            if self.trainer.global_step == 3:
                raise ArithmeticError("of the user")
            return super().training_step(batch, index)

    recipe = callback()
    with pytest.raises(ArithmeticError):
        trainer(tmp_path, recipe).fit(Failing(), datamodule=Digits())
    assert not recipe.engine.is_attached
    assert not recipe.engine.run.optimizers[0]._optimizer_step_pre_hooks


def test_a_callback_is_for_one_fit(tmp_path: Path) -> None:
    recipe = callback()
    with pytest.raises(RuntimeError, match="the engine is made by trainer"):
        _ = recipe.engine
    fit = trainer(tmp_path, recipe, ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    model = Classifier()
    fit.fit(model, datamodule=Digits())
    fit.validate(model, datamodule=Digits(), verbose=False, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    small.check_trained(recipe.engine)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit.validate(model, datamodule=Digits(), verbose=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError, match="make a new one for each"):
        fit.fit(model, datamodule=Digits())


def test_training_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give it max_steps"):
        trainer(tmp_path, callback(), max_epochs=-1, max_steps=-1).fit(Classifier(), datamodule=Digits())


class WithCriterion(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = torch.nn.CrossEntropyLoss()
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss: Tensor = self.criterion(self(batch[0]), batch[1])
        self.losses.append(float((loss - cross_entropy(self.net.eval()(batch[0]), batch[1])).detach()))
        self.net.train()
        return loss


def test_a_criterion_of_the_module_gets_the_terms(tmp_path: Path) -> None:
    model, teacher = WithCriterion(), small.vit(seed=1)
    recipe = RecipeCallback(
        Recipe.parse("modifiers: [{distill: {hard: true}}]"), network="net", criterion="criterion", teacher=teacher
    )
    trainer(tmp_path, recipe, max_epochs=1).fit(model, datamodule=Digits())
    assert min(model.losses) > 0.1
    forgotten = RecipeCallback(Recipe.parse("modifiers: [{distill: {}}]"), network="net")
    with pytest.raises(RuntimeError, match=r"the loss had no term of distill: write loss = engine.loss\(loss\)"):
        trainer(tmp_path, forgotten, max_epochs=1).fit(Classifier(), datamodule=Digits())
