"""float16 in other frameworks' loops, of which the gradient scaler skips steps: the run is no shorter for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from ovit_engine import Engine, Recipe
from ovit_engine.core.skipped_steps import SkippedSteps
from ovit_engine.core.training_options import Training
from ovit_engine.integrations.accelerate import accelerate_engine, attach_accelerate
from ovit_engine.integrations.lightning import RecipeCallback
from ovit_engine.integrations.transformers import RecipeTrainerCallback
from ovit_engine.training.steps import Steps
from tests.integrations import small
from tests.integrations import test_accelerate as accelerates
from tests.integrations import test_lightning as lightnings
from tests.integrations import test_transformers as transformers
from tests.loops import mlp, recipe

pytestmark = [
    *lightnings.pytestmark,
    *transformers.pytestmark,
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
]

LATE = r"magnitude_prune: {start: 8st, sparsity: 0.5, targets: ['re:.*(qkv|query|q_proj|fc1)\.weight']}"
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**16)


def overflow(model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    """As on a GPU: the first three steps overflow, until the scale is 2^13."""
    parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    parameter.register_hook(lambda grad: grad * (torch.inf if scaler.get_scale() > 2.0**13 else 1.0))


def check(engine: Engine, told: Any) -> None:
    """Of ten steps three were skipped, and what was due at the eighth is done all the same."""
    assert (engine.run.step, engine.run.skipped, engine.finished) == (7, 3, True)
    assert engine.run.masks.sparsity() == pytest.approx(0.5, abs=1e-3)
    texts = [str(warning.message) for warning in told]
    assert any("7 of 10 steps and 3 were skipped; pruning at step 8 is done now" in text for text in texts), texts
    assert any(text.startswith("the gradient scaler skipped 3 steps, and 7 of 10 were") for text in texts), texts


class Fit(lightnings.Classifier):
    """A Classifier with an optimizer that may be fused."""

    def __init__(self, *, fused: bool, manual: bool = False) -> None:
        super().__init__()
        self.fused, self.automatic_optimization = fused, not manual

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3, fused=self.fused)

    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        return optimizer.step()


@pytest.mark.parametrize(("fused", "manual"), [(False, False), (True, False), (False, True)])
def test_lightning(tmp_path: Path, fused: bool, manual: bool) -> None:
    model = Fit(fused=fused, manual=manual)
    precision = MixedPrecision("16-mixed", "cpu", scaler())
    assert precision.scaler is not None
    overflow(model.net, precision.scaler)
    callback = RecipeCallback(recipe(LATE), network="net")
    callbacks: list[Callback] = [callback]
    options: dict[str, Any] = {"max_epochs": 1, "plugins": [precision], "limit_val_batches": 0}
    if not manual:  # Lightning warns of checkpoints by steps there
        callbacks.append(ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1))
    fit = lightnings.trainer(tmp_path, *callbacks, enable_checkpointing=not manual, **options)
    with pytest.warns(UserWarning, match="skipped") as told:
        fit.fit(model, datamodule=lightnings.Digits())
    check(callback.engine, told)
    if manual:
        return
    states = [torch.load(path, weights_only=False) for path in tmp_path.glob("*.ckpt")]
    found = {state["global_step"]: state["callbacks"]["RecipeCallback"] for state in states}
    assert [(found[step]["step"], found[step]["skipped"]) for step in (2, 4, 6)] == [(0, 2), (1, 3), (3, 3)]


def test_lightning_without_a_scaler_skips_nothing(tmp_path: Path) -> None:
    """LBFGS evaluates several times in a step, and is about to make it as often."""
    model = Fit(fused=False)
    model.configure_optimizers = lambda: torch.optim.LBFGS(model.parameters(), 1e-3, max_iter=3)  # type: ignore[method-assign, return-value]
    callback = RecipeCallback(recipe(LATE), network="net")
    lightnings.trainer(tmp_path, callback, max_epochs=1, limit_val_batches=0).fit(model, datamodule=lightnings.Digits())
    assert (callback.engine.run.step, callback.engine.run.skipped) == (10, 0)


@FUSED
def test_transformers(tmp_path: Path, fused: bool) -> None:
    training = transformers.trainer(tmp_path, transformers.vit, num_train_epochs=1, eval_strategy="no", max_grad_norm=0)
    training.optimizer = torch.optim.SGD(training.model.parameters(), 1e-3, fused=fused)  # type: ignore[union-attr]
    training.accelerator.scaler = scaler()  # as where mixed precision is fp16, which Accelerate makes on GPUs only
    overflow(training.model, training.accelerator.scaler)  # type: ignore[arg-type]
    callback = RecipeTrainerCallback(training, recipe(LATE))
    with pytest.warns(UserWarning, match="skipped") as told:
        training.train()
    check(callback.engine, told)


@FUSED
def test_accelerate(fused: bool) -> None:
    accelerator: Accelerator = accelerates.accelerator(gradient_accumulation_steps=2)
    accelerator.scaler = scaler()
    loader = accelerator.prepare(DataLoader(small.TRAIN, batch_size=16))
    model = small.vit()
    overflow(model, accelerator.scaler)
    engine = accelerate_engine(accelerator, model, recipe(LATE), loader, epochs=1)
    inner = torch.optim.SGD(model.parameters(), 1e-3, fused=fused)
    network, optimizer = accelerator.prepare(model, inner)
    attach_accelerate(engine, optimizer)
    for images, classes in loader:
        with accelerator.accumulate(network):
            accelerator.backward(cross_entropy(network(images), classes))
            optimizer.step()
            optimizer.zero_grad()
    with pytest.warns(UserWarning, match="skipped") as told:
        engine.detach()
    check(engine, told)
    assert not optimizer._optimizer_step_post_hooks


def test_the_average_of_the_bundled_trainer_takes_no_weights_of_a_skipped_step() -> None:
    model = nn.Linear(4, 2)
    engine = Engine(model, Recipe.parse("modifiers: []"), steps_per_epoch=4, epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    ema = ModelEmaV3(model, decay=0.5)
    before = ema.module.weight.clone()
    with torch.no_grad():
        model.weight.add_(1.0)  # where model and average are one, an average that moves is not seen
    steps = Steps(
        Training(), engine, model, optimizer, device=torch.device("cpu"), mixup=None, scheduler=None, ema=ema, amp=False
    )
    steps.scaler = scaler()
    overflow(model, steps.scaler)
    for skipped in (1, 2, 3):
        steps([(torch.ones(3, 4), torch.tensor([0, 1, 0]))], 0)
        assert (engine.run.step, engine.run.skipped) == (0, skipped)
        assert torch.equal(ema.module.weight, before)
    steps([(torch.ones(3, 4), torch.tensor([0, 1, 0]))], 1)
    assert (engine.run.step, engine.run.skipped) == (1, 3)
    assert not torch.equal(ema.module.weight, before)


def test_a_step_is_counted_once_whoever_counts_it() -> None:
    run = Engine(mlp(), recipe(), steps_per_epoch=4, epochs=1).run
    skips = SkippedSteps(run)
    assert not skips.end()  # none was begun
    skips.begin()
    run.count_step()
    assert not skips.end()
    skips.begin()
    assert skips.end()
    assert not skips.end()
    skips.begin()
    run.skip_step(seen=True)  # the engine saw it, as of a fused optimizer
    assert skips.end()
    skips.begin()
    skips.begin()  # the one before came to no end of its own
    assert (run.step, run.skipped) == (1, 3)
