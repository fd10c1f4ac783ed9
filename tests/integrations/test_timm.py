"""A loop like timm's own train.py, of timm's parts, on an ImageFolder of real JPEG files."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import Mixup, create_dataset, create_loader
from timm.data.mixup import FastCollateMixup
from timm.loss import SoftTargetCrossEntropy
from timm.models import model_parameters, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch import nn

from ovit_engine import Calibration, Engine, Recipe
from ovit_engine.integrations.timm import timm_calibration, timm_engine
from tests.integrations import small

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning"),  # timm leaves them to Python
    pytest.mark.filterwarnings("ignore:cyclic_lr. something else changed the learning rate:UserWarning"),
]

MIXUP: dict[str, Any] = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1, "num_classes": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 digits as grey JPEG files of 16x16 in train/, as many in val/, a folder a class."""
    root = tmp_path_factory.mktemp("images")
    found = load_digits()
    for index, (image, digit) in enumerate(zip(found.images[:640], found.target[:640], strict=True)):
        place = root / ("train" if index < 320 else "val") / str(digit)
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(image * 15.9, np.ones((2, 2))).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(place / f"{index}.jpg", quality=95)
    return root


def loader(folder: Path, split: str = "train", *, prefetcher: bool = False, mixup: bool = False) -> Any:
    training = split == "train"
    return create_loader(
        create_dataset("", root=str(folder), split=split),
        input_size=(3, 16, 16),
        batch_size=small.BATCH,
        is_training=training,
        use_prefetcher=prefetcher,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
        collate_fn=FastCollateMixup(**MIXUP) if mixup and prefetcher else None,
    )


def vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=10
    )
    return model


class Training:
    """main() of train.py, with the four lines of the recipe marked."""

    def __init__(
        self, folder: Path, *, prefetcher: bool = False, accumulate: int = 1, amp: str = "", sched: str = "cosine"
    ) -> None:
        self.model, self.accumulate, self.amp = vit(), accumulate, amp
        self.loader = loader(folder, prefetcher=prefetcher, mixup=True)
        self.mixup = None if prefetcher else Mixup(**MIXUP)
        self.updates = math.ceil(len(self.loader) / accumulate)
        self.engine = timm_engine(  # 1: before optimizer and EMA
            self.model, small.recipe(), self.loader, epochs=small.EPOCHS, grad_accum_steps=accumulate
        )
        self.optimizer = create_optimizer_v2(self.model, opt="adamw", lr=1e-3, weight_decay=0.05)
        self.scaler = NativeScaler(device="cpu") if amp == "float16" else None
        self.ema = ModelEmaV3(self.model, decay=0.9)
        self.scheduler = None
        if sched != "none":
            self.scheduler, epochs = create_scheduler_v2(
                self.optimizer,
                sched=sched,
                num_epochs=small.EPOCHS,
                updates_per_epoch=self.updates,
                step_on_epochs=False,
            )
            assert epochs == small.EPOCHS
        self.loss = SoftTargetCrossEntropy()
        self.rates: list[float] = []

    def attach(self) -> "Training":
        calibration = timm_calibration(self.loader)
        self.engine.attach(self.optimizer, calibration=calibration, ema=self.ema)  # 2
        self.watch = self.optimizer.register_step_post_hook(
            lambda optimizer, *_: self.rates.append(optimizer.param_groups[0]["lr"])
        )
        return self

    def epoch(self, epoch: int) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        update, batches = epoch * self.updates, len(self.loader)
        for index, (images, classes) in enumerate(self.loader):
            last = index + 1 == batches
            need_update = last or (index + 1) % self.accumulate == 0
            if self.mixup is not None:
                images, classes = self.mixup(images, classes)
            with torch.autocast("cpu", getattr(torch, self.amp or "bfloat16"), enabled=bool(self.amp)):
                loss = self.loss(self.model(images), classes)
            parameters = model_parameters(self.model)
            if self.scaler is not None:
                self.scaler(loss, self.optimizer, clip_grad=1.0, parameters=parameters, need_update=need_update)
            else:
                (loss / self.accumulate).backward()
                if need_update:
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                    self.optimizer.step()
            if need_update:
                self.optimizer.zero_grad()
                update += 1
                self.ema.update(self.model, step=update)
                if self.scheduler is not None:
                    self.scheduler.step_update(num_updates=update, metric=0.0)
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, 0.0)
        self.engine.metric("accuracy", 0.0)  # 3: of validate()

    def train(self, epochs: range = range(small.EPOCHS)) -> "Training":
        for epoch in epochs:
            self.epoch(epoch)
        self.engine.detach()  # 4
        self.watch.remove()
        return self


@pytest.mark.parametrize(
    ("options", "exports"),
    [
        ({}, True),
        ({"amp": "bfloat16"}, False),
        ({"amp": "float16"}, False),
        ({"accumulate": 3}, False),
        ({"prefetcher": True}, True),
        ({"sched": "none"}, False),
    ],
)
def test_train_py(folder: Path, tmp_path: Path, options: dict[str, Any], exports: bool) -> None:
    torch.manual_seed(0)
    training = Training(folder, **options).attach().train()
    engine = training.engine
    if "amp" in options and options["amp"] == "float16":  # the scaler's first steps may overflow and are skipped
        assert engine.run.total_steps - engine.run.step <= 1
    else:
        small.check_trained(engine)
    assert engine.run.masks.sparsity() == 0.5
    period = engine.run.steps_per_epoch
    expected = [2e-3 - 1.9e-3 * (step % period) / period for step in range(engine.run.step)]
    assert training.rates[: engine.run.step] == pytest.approx(expected)  # whatever timm's scheduler wrote
    averaged = dict(training.ema.module.named_parameters())
    for name in engine.run.masks.names():
        mask = engine.run.masks.get(name)
        assert mask is not None
        assert (averaged[name][~mask] == 0).all(), name
    if exports:
        data = loader(folder, "val", prefetcher=bool(training.mixup is None))
        for model in (None, training.ema.module):
            engine.export(tmp_path / "model.onnx", torch.randn(2, 3, 16, 16), model=model, data=data)


def test_the_rival_schedule_is_named_once(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"something else changed the learning rate .* \(a scheduler\?\)") as caught:
        Training(folder).attach().train()
    assert len([each for each in caught if "changed the learning rate" in str(each.message)]) == 1


def test_calibration_is_of_hard_labels_and_normalized_images_with_and_without_prefetcher(folder: Path) -> None:
    recipe = Recipe.parse(
        "modifiers: [{ovit_prune: {sparsity: 0.5, targets: ['re:.*(qkv|fc1).weight'], block: 16, gradients: 8}}]"
    )
    results = []
    for prefetcher in (False, True):
        model = vit()
        data = loader(folder, prefetcher=prefetcher, mixup=True)
        engine = Engine(model, recipe, steps_per_epoch=10, epochs=1).prepare()
        images, classes = _first_batch(timm_calibration(data))
        assert classes.dtype == torch.int64
        assert images.dtype == torch.float32
        assert -4 < float(images.min()) < 0 < float(images.max()) < 4
        engine.attach(torch.optim.SGD(model.parameters()), calibration=timm_calibration(data))
        results.append(images)
    assert results[0].shape == results[1].shape
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)  # the same augmentation of the same images


def _first_batch(calibration: Calibration) -> Any:
    seed_all(0)
    options = calibration._loader_options
    items = [calibration.dataset[index] for index in range(8)]
    return options["collate_fn"](items)


def test_resuming_with_timms_checkpoints_is_bit_exact(folder: Path, tmp_path: Path) -> None:
    """train.py's own loader order is not kept by timm's checkpoints: each epoch here starts from a seed of its own."""
    whole = Training(folder).attach()
    saver = CheckpointSaver(
        whole.model, whole.optimizer, model_ema=whole.ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    for epoch in range(2):
        seed_all(epoch)
        whole.epoch(epoch)
    saver.save_checkpoint(1)
    torch.save(whole.engine.state_dict(), tmp_path / "engine.pt")

    resumed = Training(folder)
    resumed.engine.load_state_dict(torch.load(tmp_path / "engine.pt", weights_only=True))
    resume_checkpoint(resumed.model, str(tmp_path / "checkpoint-1.pth.tar"), resumed.optimizer, None, log_info=False)
    averaged = torch.load(tmp_path / "checkpoint-1.pth.tar", weights_only=True)["state_dict_ema"]
    resumed.ema.module.load_state_dict(averaged)
    resumed.attach()
    for training in (whole, resumed):
        for epoch in (2, 3):
            seed_all(epoch)
            training.epoch(epoch)
        training.engine.detach()
    assert small.equal(resumed.model, whole.model)
    assert small.equal(resumed.ema.module, whole.ema.module)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
