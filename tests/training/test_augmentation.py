"""Training presets: the values of Table 3 of the oViT paper, what wins over them, and what they do to images."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, log_softmax, one_hot

from ovit_engine import Recipe, RecipeError
from ovit_engine.core.training_options import Augmentation, Training
from ovit_engine.training.api import SILENT, Trained, make_model, train, with_training
from ovit_engine.training.augmentation import (
    AUGMENTATION_PRESETS,
    calibration_transform,
    make_mixup,
    training_transform,
    with_preset,
)
from ovit_engine.training.batches import part_size
from ovit_engine.training.data import load_data, model_data_config
from ovit_engine.training.trainer import Trainer
from tests.training.conftest import tiny_recipe

CONFIG = model_data_config("deit_tiny_patch16_224", {"img_size": 16})
FOLDER_MODEL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "weight_init": "jax"}

OVIT = """
  - ovit_prune: {start: 1ep, sparsity: 0.5, targets: ["re:blocks.*(qkv|fc1)\\\\.weight"], block: 16, gradients: 6,
                 images_per_gradient: 4}
  - cyclic_lr: {max: 2.0e-3, min: 1.0e-5, period: 1ep}
"""


def folder_recipe(modifiers: str = "[]", **options: Any) -> Recipe:
    return with_training(tiny_recipe(modifiers, epochs=3), **{"model_args": FOLDER_MODEL, **options})


def make_trainer(recipe: Recipe, data: Path | str, output: Path) -> Trainer:
    trainer = Trainer(recipe, str(data), output, torch.device("cpu"), 0, False, None)
    trainer.prepare(pretrained=False, checkpoint=None)
    trainer._begin()
    return trainer


# --- values


@pytest.mark.parametrize(
    ("name", "decay", "clip", "drop_path", "rand_augment", "mixup", "cutmix", "erasing", "repeats", "eps"),
    [  # Table 3, and specs/second-order.md §3
        ("light1", 0.03, 1.0, 0.0, "rand-m0-n2-inc1", 0.0, 0.0, 0.0, 1, 1e-6),
        ("light2", 0.03, 1.0, 0.0, "rand-m10-n2-inc1", 0.2, 0.2, 0.0, 1, 1e-6),
        ("medium1", 0.03, 1.0, 0.0, "rand-m15-n2-inc1", 0.2, 0.2, 0.0, 1, 1e-6),
        ("medium2", 0.03, 1.0, 0.0, "rand-m15-n2-inc1", 0.5, 0.5, 0.0, 1, 1e-6),
        ("deit", 0.05, None, 0.1, "rand-m9-mstd0.5-inc1", 0.8, 1.0, 0.25, 3, 1e-8),
        ("deit_light", 0.005, None, 0.1, "rand-m6-mstd0.5-inc1", 0.8, 1.0, 0.25, 1, 1e-8),
    ],
)
def test_the_values_of_table_3(
    name: Augmentation,
    decay: float,
    clip: float | None,
    drop_path: float,
    rand_augment: str,
    mixup: float,
    cutmix: float,
    erasing: float,
    repeats: int,
    eps: float,
) -> None:
    training = with_preset(Training(augmentation=name))
    assert (training.weight_decay, training.clip_grad, training.label_smoothing) == (decay, clip, 0.1)
    assert training.model_args.get("drop_path_rate", 0.0) == drop_path
    preset = AUGMENTATION_PRESETS[name]
    assert (preset.auto, preset.mixup, preset.cutmix, preset.erasing) == (rand_augment, mixup, cutmix, erasing)
    assert (preset.repeats, preset.eps, preset.crop) == (repeats, eps, 0.9)
    assert preset.mixing == (0.2 if name == "deit_light" else 1.0)
    assert preset.ratio == pytest.approx((0.67, 1.5) if name.startswith("deit") else (0.75, 1.333), abs=1e-3)


def test_every_preset_can_be_named_in_a_recipe() -> None:
    assert set(get_args(Augmentation)) == {"none", "noise", "standard", *AUGMENTATION_PRESETS}


def test_what_a_recipe_writes_wins() -> None:
    text = "{augmentation: light1, weight_decay: 0.2, clip_grad: null, label_smoothing: 0}"
    training = with_preset(Recipe.parse(f"training: {text}\nmodifiers: []").training)
    assert (training.weight_decay, training.clip_grad, training.label_smoothing) == (0.2, None, 0.0)
    drop = with_preset(Training(augmentation="deit", model_args={"drop_path_rate": 0.3, "img_size": 32}))
    assert drop.model_args == {"drop_path_rate": 0.3, "img_size": 32}


@pytest.mark.parametrize("name", ["none", "noise", "standard"])
def test_without_a_preset_training_stays(name: Augmentation) -> None:
    training = Training(augmentation=name, clip_grad=2.0)
    assert with_preset(training) == training


def test_stochastic_depth_of_the_model() -> None:
    model = make_model(Training(model="deit_tiny_patch16_224", model_args=FOLDER_MODEL, augmentation="deit"))
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)  # type: ignore[union-attr, index]
    with pytest.raises(
        ValueError, match="vgg11 has no stochastic depth, which augmentation 'deit' sets: write model_ar"
    ):
        make_model(Training(model="vgg11", augmentation="deit"))
    with torch.device("meta"):
        make_model(Training(model="vgg11", augmentation="deit", model_args={"drop_path_rate": None}))


# --- images


def test_what_is_done_to_training_images() -> None:
    text = str(training_transform(CONFIG, "deit"))
    order = ["RandomResizedCrop", "RandomHorizontalFlip(p=0.5)", "RandAugment(n=2", "Normalize", "RandomErasing(p=0.25"]
    places = [text.index(part) for part in order]
    assert all(before < after for before, after in pairwise(places))
    assert "m=9, mstd=0.5" in text
    assert "mode=pixel, count=(1, 1)" in text
    assert "scale=(0.08, 1.0), ratio=(0.67, 1.5), interpolation=bicubic" in text
    light = str(training_transform(CONFIG, "light1"))
    assert "m=0, mstd=0" in light
    assert "ratio=(0.75, 1.3333)" in light
    assert "Erasing" not in light
    trivial = str(training_transform(CONFIG, "torchvision"))
    assert "TrivialAugmentWide" in trivial
    assert "RandAugment" not in trivial


@pytest.mark.parametrize("name", [*AUGMENTATION_PRESETS, "standard"])
def test_calibration_images_are_cropped_flipped_and_jittered_only(name: str) -> None:
    text = str(calibration_transform(CONFIG, name))
    assert "scale=(0.08, 1.0), ratio=(0.75, 1.3333)" in text
    assert "RandomHorizontalFlip(p=0.5)" in text
    assert "ColorJitter(brightness=(0.6, 1.4)" in text
    assert not any(word in text for word in ("RandAugment", "Trivial", "Erasing"))


@pytest.mark.parametrize("name", list(AUGMENTATION_PRESETS))
def test_images_of_every_preset(name: str) -> None:
    transform = training_transform(CONFIG, name)
    image = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint32).reshape(30, 40, 3).astype(np.uint8))
    made = [transform(image) for _ in range(40)]
    assert all(one.shape == (3, 16, 16) and one.dtype == torch.float32 and one.isfinite().all() for one in made)
    assert len({one.numpy().tobytes() for one in made}) > 30


@pytest.mark.parametrize("name", ["deit", "deit_light", "medium2"])
def test_randaugment_at_its_limit_posterizes_to_one_bit(name: str) -> None:
    transform = training_transform(CONFIG, name)
    (posterize,) = [op for op in transform.transforms[1].transforms[0].ops if op.name.startswith("Post")]  # type: ignore
    posterize.prob, posterize.magnitude, posterize.magnitude_std = 1.0, 10, 0
    shades = np.unique(np.asarray(posterize(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)))))
    assert shades.tolist() == [0, 128]


def test_presets_evaluate_as_table_3_says(jpeg_folder: Path) -> None:
    config = {**CONFIG, "crop_pct": 0.5}
    assert load_data(jpeg_folder, config=config, augmentation="deit").preprocessing["crop"] == 0.9
    assert load_data(jpeg_folder, config=config, augmentation="standard").preprocessing["crop"] == 0.5
    assert load_data(jpeg_folder, config=config, augmentation="torchvision").preprocessing["crop"] == 0.5


def test_views_of_one_folder_count_an_unreadable_image_once(
    jpeg_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut = jpeg_folder / "train" / "across" / "3.jpg"
    cut.write_bytes(b"")
    data = load_data(jpeg_folder, config=CONFIG, augmentation="light1")
    assert data.calibration[3][0].shape == (3, 16, 16)
    assert data.unreadable == [str(cut)]
    assert data.train[3][0].shape == (3, 16, 16)
    assert data.unreadable == [str(cut)]
    assert len(caplog.records) == 1


# --- what does not fit


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("augmentation: deti", "r.yaml:1:26: training.augmentation: there is no 'deti'; did you mean 'deit'?"),
        ("augmentation: [deit]", r"r.yaml:1:26: training.augmentation: there is no \['deit'\]"),
        ("augmentations: deit", "training has no option 'augmentations'; did you mean 'augmentation'?"),
        ("batch_size: 10, accumulate: 4", "r.yaml:1:11: training: a batch of 10 does not divide into 4 equal parts"),
        ("accumulate: 0", "training.accumulate: input should be greater than 0: 0"),
    ],
)
def test_options_that_do_not_fit(given: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        Recipe.parse(f"training: {{{given}}}\nmodifiers: []", file="r.yaml")


def test_options_that_do_not_fit_from_the_command_line() -> None:
    with pytest.raises(ValueError, match=r"^training\.augmentation: there is no 'light'; did you mean 'light1'\?$"):
        with_training(tiny_recipe(), augmentation="light")
    with pytest.raises(ValueError, match=r"^training: a batch of 10 does not divide into 4 equal parts$"):
        with_training(tiny_recipe(), batch_size=10, accumulate=4)
    with pytest.raises(ValueError, match=r"^training\.accumulate: input should be greater than 0, not 0$"):
        with_training(tiny_recipe(), accumulate=0)


def test_presets_are_for_colour_images(tmp_path: Path, jpeg_folder: Path) -> None:
    for args in ({"in_chans": 1}, {"in_chans": 3}):
        recipe = with_training(tiny_recipe(), augmentation="deit", model_args={**FOLDER_MODEL, **args})
        with pytest.raises(ValueError, match="digits must not be flipped or cropped, as 'deit' does"):
            train(recipe, data="digits", output=tmp_path / "run")
    grey = folder_recipe(augmentation="light1", model_args={**FOLDER_MODEL, "in_chans": 1})
    with pytest.raises(ValueError, match="'light1' is made for colour images: the model takes 1 channel \\(use"):
        train(grey, data=jpeg_folder, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_parts_of_a_batch() -> None:
    training = Training(batch_size=1024, accumulate=4)
    assert part_size(training, 10_000, paired=True) == 256
    assert part_size(training, 100, paired=False) == 25  # all images are one batch
    assert part_size(training, 100, paired=True) == 24
    with pytest.raises(ValueError, match="3 training images are too few for accumulate: 4"):
        part_size(training, 3, paired=False)
    with pytest.raises(ValueError, match="'deit' mixes images in pairs: batch_size / accumulate must be even, not 5"):
        part_size(Training(batch_size=20, accumulate=4, augmentation="deit"), 1000, paired=True)


# --- training


def test_mixed_batches_and_their_loss(tmp_path: Path, jpeg_folder: Path) -> None:
    recipe = folder_recipe(augmentation="deit", batch_size=4, label_smoothing=0.2)
    trainer = make_trainer(recipe, jpeg_folder, tmp_path)
    assert trainer.mixup is not None
    trainer.mixup.switch_prob = 0.0  # mixup, whose arithmetic is written out below
    trainer.model.eval()
    torch.nn.init.normal_(trainer.model.head.weight)  # type: ignore[union-attr, arg-type]  # made as zeros, which answer all alike
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 1])
    np.random.seed(3)
    loss = trainer.step.loss(images.clone(), labels)
    np.random.seed(3)
    np.random.rand(2)  # whether to mix, and how
    share = np.random.beta(0.8, 0.8)
    mixed = share * images + (1 - share) * images.flip(0)
    hard = one_hot(labels, 2).float()
    soft = (share * hard + (1 - share) * hard.flip(0)) * 0.8 + 0.2 / 2
    expected = -(soft * log_softmax(trainer.model(mixed), -1)).sum(-1).mean()
    torch.testing.assert_close(loss, expected)


def test_only_presets_that_mix_make_soft_labels() -> None:
    mixing = {name for name in get_args(Augmentation) if make_mixup(Training(augmentation=name), 10) is not None}
    assert mixing == {"light2", "medium1", "medium2", "deit_light", "deit", "torchvision"}


def test_deit_light_mixes_a_batch_in_five() -> None:
    mixup = make_mixup(Training(augmentation="deit_light"), 2)
    assert mixup is not None
    np.random.seed(0)
    images = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    mixed = [not torch.equal(mixup(images.clone(), torch.tensor([0, 1]))[0], images) for _ in range(500)]
    assert 60 < sum(mixed) < 140


def test_light1_smooths_hard_labels(tmp_path: Path, jpeg_folder: Path) -> None:
    trainer = make_trainer(folder_recipe(augmentation="light1"), jpeg_folder, tmp_path)
    trainer.model.eval()
    torch.nn.init.normal_(trainer.model.head.weight)  # type: ignore[union-attr, arg-type]
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
    expected = cross_entropy(trainer.model(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(trainer.step.loss(images, labels), expected)
    assert {group["eps"] for group in trainer.optimizer.param_groups} == {1e-6}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {
        0.0,
        0.03,
    }  # none of biases and norms


def test_calibration_takes_hard_labels_plain_loss_and_its_own_view(tmp_path: Path, jpeg_folder: Path) -> None:
    trainer = make_trainer(folder_recipe(OVIT, augmentation="deit", batch_size=8), jpeg_folder, tmp_path)
    trainer.fit(SILENT)
    calibration = trainer.engine.run.calibration
    assert calibration is not None
    assert calibration.dataset is trainer.data.calibration  # type: ignore[attr-defined]
    assert calibration.loss_fn is cross_entropy  # type: ignore[attr-defined]
    assert isinstance(trainer.data.calibration[0][1], int)


def test_repeated_augmentation(tmp_path: Path, jpeg_folder: Path) -> None:
    trainer = make_trainer(folder_recipe(augmentation="deit", batch_size=6), jpeg_folder, tmp_path)
    assert trainer.steps == 20 // 6  # as long an epoch as without
    orders = []
    for epoch in (1, 2, 1):
        trainer.batches.go_to(epoch, 0)
        orders.append([index for batch in trainer.batches for _, index in batch])
    assert orders[0] == orders[2] != orders[1]
    assert all(order[i] == order[i + 1] == order[i + 2] for order in orders for i in range(0, 18, 3))
    assert len(set(orders[0])) == 6
    seen = []
    trainer.fit(replace(SILENT, end=lambda metrics: seen.append([i for batch in trainer.batches for _, i in batch])))
    assert len({tuple(order) for order in seen}) == 3  # other images in each epoch
    assert all(order[0] == order[1] == order[2] for order in seen)


def test_a_batch_in_parts_takes_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    args = {**tiny_recipe().training.model_args, "drop_rate": 0.0}
    recipe = with_training(tiny_recipe(epochs=1, extra="batch_size: 256, optimizer: sgd, lr: 0.1"), model_args=args)
    recipe = with_training(recipe, clip_grad=0.5)
    whole = train(recipe, data="digits", output=tmp_path / "1")
    parts = train(with_training(recipe, accumulate=4), data="digits", output=tmp_path / "4")
    assert parts.engine.run.step == whole.engine.run.step == 1347 // 256
    assert parts.metrics[0].loss == pytest.approx(whole.metrics[0].loss, rel=1e-5)
    for (name, ours), theirs in zip(parts.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


class InterruptedRunError(Exception):
    pass


@pytest.mark.parametrize(("name", "workers"), [("deit", 0), ("light1", 0), ("torchvision", 0), ("deit", 1)])
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(
    name: Augmentation, workers: int, tmp_path: Path, jpeg_folder: Path
) -> None:
    recipe = folder_recipe(OVIT, augmentation=name, batch_size=8, accumulate=2)

    def run(folder: str, stop: int | None = None, **options: Any) -> Trained:
        def begin(epoch: int, epochs: int, steps: int) -> None:
            if epoch == stop:
                raise InterruptedRunError
            assert steps == 2

        progress = replace(SILENT, begin=begin)
        return train(
            recipe,
            data=jpeg_folder,
            output=tmp_path / folder,
            workers=workers,
            progress=progress,
            device="cpu",
            **options,
        )

    unbroken = run("unbroken")
    with pytest.raises(InterruptedRunError):
        run("broken", 3)
    resumed = run("broken", resume=tmp_path / "broken")
    assert [replace(row, seconds=0.0) for row in resumed.metrics] == [
        replace(row, seconds=0.0) for row in unbroken.metrics
    ]
    for key, ours in resumed.model.state_dict().items():
        assert torch.equal(ours, unbroken.model.state_dict()[key]), key
    assert resumed.metrics[-1].sparsity == 0.5
