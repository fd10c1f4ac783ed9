"""The averaged copy, mixed precision and timm's schedules in the bundled trainer."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from ovit_engine import Recipe, RecipeError
from ovit_engine.sweep.folder import FOLDER, read_index
from ovit_engine.training.api import SILENT, evaluate, make_model, train, with_training
from ovit_engine.training.checkpoint import load_checkpoint, load_weights
from ovit_engine.training.data import config_of, load_data
from ovit_engine.training.runs import restore
from ovit_engine.training.sweep_run import load_point
from ovit_engine.training.trainer import Trainer
from tests.training.conftest import tiny_recipe

CPU = torch.device("cpu")
PRUNE = r"magnitude_prune: {start: 1ep, sparsity: 0.5, targets: ['re:blocks.*(qkv|fc1)\.weight'], sweep: [0.5]"


def make_trainer(recipe: Recipe, output: Path, **options: Any) -> Trainer:
    trainer = Trainer(recipe, "digits", output, CPU, 0, False, None, **options)
    trainer.prepare(pretrained=False, checkpoint=None)
    return trainer


# --- the averaged copy


def test_the_average_is_that_of_the_weights_after_each_step(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_recipe(epochs=2, extra="batch_size: 256, ema: 0.8, lr: 1.0e-2"), tmp_path)
    seen: list[dict[str, torch.Tensor]] = []
    trained = trainer.fit(
        replace(SILENT, step=lambda: seen.append({k: v.double() for k, v in trainer.model.state_dict().items()}))
    )
    assert len(seen) == 10
    average = seen[0]  # timm begins it at the first step
    for weights in seen[1:]:
        average = {name: 0.8 * average[name] + 0.2 * weights[name] for name in average}
    state = load_checkpoint(tmp_path)
    for name, expected in average.items():
        torch.testing.assert_close(state["ema"][name].double(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(state["model"][name].double(), seen[-1][name])  # training would go on from these
        assert torch.equal(trained.model.state_dict()[name], state["ema"][name])
    assert not torch.equal(state["ema"]["head.weight"], state["model"]["head.weight"])


def test_the_average_is_what_is_validated_restored_exported_and_swept(tmp_path: Path) -> None:
    args = {**tiny_recipe().training.model_args, "drop_rate": 0.0, "embed_dim": 32, "weight_init": "jax"}
    extra = "batch_size: 32, ema: 0.98, lr: 5.0e-3"
    recipe = tiny_recipe(f"[{{{PRUNE}}}}}, {{quantize: {{start: 1.5ep}}}}]", extra=extra)
    recipe = with_training(recipe, model_args=args)
    trained = train(recipe, data="digits", output=tmp_path, device="cpu")
    state = load_checkpoint(tmp_path)
    back = restore(tmp_path)
    images = load_data("digits", config=config_of(back.preprocessing)).val
    assert evaluate(back.model, DataLoader(images, 64), CPU) == trained.metrics[-1].accuracy
    back.model.load_state_dict(state["model"])
    assert evaluate(back.model, DataLoader(images, 64), CPU) != trained.metrics[-1].accuracy
    for model in (trained.model, restore(tmp_path).model):
        weight = model.get_parameter("blocks.0.mlp.fc1.weight")
        assert torch.equal(weight, state["ema"]["blocks.0.mlp.fc1.weight"])
        mask = trained.engine.run.masks.get("blocks.0.mlp.fc1.weight")
        assert mask is not None
        assert not weight[~mask].any()
    fresh = make_model(trained.engine.recipe.training)
    load_weights(fresh, tmp_path)
    assert torch.equal(fresh.get_parameter("head.weight"), state["ema"]["head.weight"])
    certificate = restore(tmp_path).engine.export(
        tmp_path / "m.onnx", torch.zeros(1, 1, 8, 8), data=DataLoader(images, 64)
    )
    assert certificate.accuracy is not None
    assert certificate.accuracy.file == pytest.approx(trained.metrics[-1].accuracy, abs=0.01)
    (point,) = read_index(tmp_path / FOLDER).points
    model = make_model(trained.engine.recipe.training)
    load_point(model, tmp_path / FOLDER / point.checkpoint)
    assert evaluate(model, DataLoader(images, 64), CPU) == point.metric


# --- mixed precision


def test_amp_computes_in_bfloat16_and_validates_in_float32(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_recipe(epochs=1, extra="batch_size: 256, ema: 0.5"), tmp_path, amp=True)
    seen: set[tuple[bool, torch.dtype]] = set()
    for model in (trainer.model, trainer.deployed):
        model.get_submodule("blocks.0.attn.qkv").register_forward_hook(
            lambda module, inputs, output: seen.add((module.training, output.dtype))
        )
    trained = trainer.fit(SILENT)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {parameter.dtype for parameter in trained.model.parameters()} == {torch.float32}
    assert load_checkpoint(tmp_path)["loop"]["amp"] is True


# --- schedules


def rates(trainer: Trainer) -> list[float]:
    found: list[float] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: found.append(float(optimizer.param_groups[0]["lr"]))  # type: ignore[arg-type]
    )
    trainer.fit(SILENT)
    return found


def scheduled(scheduler: str, modifiers: str = "[]", **arguments: Any) -> Recipe:
    recipe = tiny_recipe(modifiers, epochs=4, extra="batch_size: 256, lr: 1.0e-2")
    return with_training(recipe, scheduler=scheduler, scheduler_args=arguments)


def test_a_cosine_with_warm_up(tmp_path: Path) -> None:
    recipe = scheduled("cosine", warmup_epochs=1, warmup_lr=1e-4, min_lr=1e-3)
    warm = [1e-4 + step * (1e-2 - 1e-4) / 5 for step in range(5)]
    falling = [1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + math.cos(math.pi * step / 20)) for step in range(5, 20)]
    assert rates(make_trainer(recipe, tmp_path)) == pytest.approx(warm + falling, rel=1e-9)


def test_a_schedule_in_steps(tmp_path: Path) -> None:
    found = rates(make_trainer(scheduled("step", decay_epochs=2, decay_rate=0.1), tmp_path))
    assert found == pytest.approx([1e-2] * 10 + [1e-3] * 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"warmup_epoch": 1},
            "training.scheduler_args.warmup_epoch: no such option; did you mean 'warmup_epochs'?",
        ),
        ({"num_epochs": 9}, "training.scheduler_args.num_epochs: no such option; "),
        ({"min_lr": "1e-5"}, "training.scheduler_args.min_lr: must be a number, not '1e-5'"),
        ({"cooldown_epochs": 2}, "training.scheduler_args: the schedule takes 6 epochs, training 4"),
        ({"min_lr": [0.1]}, "training.scheduler_args: timm refuses them: '>=' not supported between instances of"),
        ({"min_lr": -1}, "training.scheduler_args: timm refuses them: AssertionError"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train(scheduled("cosine", **arguments), data="digits", output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_one_schedule_only(tmp_path: Path) -> None:
    recipe = scheduled("cosine", "[{cyclic_lr: {max: 1.0e-3, min: 1.0e-5}}]")
    with pytest.raises(RecipeError, match="cyclic_lr: writes the learning rate, as scheduler 'cosine' of"):
        train(recipe, data="digits", output=tmp_path, device="cpu")
    with pytest.raises(RecipeError, match="scheduler_args without a scheduler: name one"):
        Recipe.parse("training: {scheduler_args: {min_lr: 0.1}}\nmodifiers: []")
