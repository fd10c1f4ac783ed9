"""Hugging Face's own Trainer under a recipe: a ViT and a RoBERTa made from configurations, on data made here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from ovit_engine import Recipe
from ovit_engine.integrations.transformers import RecipeTrainerCallback
from tests.integrations import small

pytestmark = [pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")]

TARGET = "(query|q_proj|intermediate.dense|fc1)"


class Digits(Dataset[dict[str, Any]]):
    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError
        return {"pixel_values": small.IMAGES[self.first + index], "labels": int(small.CLASSES[self.first + index])}


class Tokens(Dataset[dict[str, Any]]):
    """Does token 5 come before token 6? Sequences of 8 to 12 tokens, padded."""

    def __init__(self, count: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.items = []
        for _ in range(count):
            length = int(draw.integers(8, 13))
            ids = draw.integers(7, 30, length)
            one, two = draw.choice(np.arange(1, length), 2, replace=False)
            ids[0], ids[one], ids[two] = 0, 5, 6
            padded = np.concatenate([ids, np.ones(12 - length, int)])  # RoBERTa pads with 1
            mask = (np.arange(12) < length).astype(int)
            self.items.append({"input_ids": padded, "attention_mask": mask, "labels": int(one < two)})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def vit() -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def roberta() -> Any:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=20, num_labels=2, type_vocab_size=1,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def trainer(path: Path, make: Callable[[], Any], **options: Any) -> Trainer:
    text = make is roberta
    arguments = TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=small.BATCH,
        per_device_eval_batch_size=160,
        use_cpu=True,
        **{
            "num_train_epochs": small.EPOCHS, "learning_rate": 1e-3, "logging_steps": 5, "save_strategy": "no",
            "eval_strategy": "epoch", "report_to": [], "disable_tqdm": True, **options,
        },
    )  # fmt: skip
    return Trainer(
        model=make(),
        args=arguments,
        train_dataset=Tokens(320, 0) if text else Digits(0, 320),
        eval_dataset=Tokens(320, 1) if text else Digits(320, 640),
        compute_metrics=accuracy,
    )


def recipe() -> Recipe:
    text = small.RECIPE.replace("TARGET", TARGET)
    return Recipe.parse(text.replace("quantize: {", 'quantize: {exclude: ["re:classifier.*"], '))


@pytest.mark.parametrize("make", [vit, roberta])
def test_a_training_ends_in_a_verified_file(tmp_path: Path, make: Callable[[], Any]) -> None:
    training = trainer(tmp_path, make)
    callback = RecipeTrainerCallback(training, recipe())
    training.train()
    small.check_trained(callback.engine)
    assert (callback.engine.run.steps_per_epoch, callback.engine.run.total_steps) == (10, 40)
    metrics = [step for step, name, _ in callback.engine.run.history if name == "eval_accuracy"]
    assert metrics == [10, 20, 30, 40]
    certificate = callback.export(tmp_path / "model.onnx")
    assert certificate.accuracy is not None
    evaluated = training.evaluate()
    assert certificate.accuracy.pytorch == pytest.approx(evaluated["eval_accuracy"])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert len(session.get_inputs()) == (2 if make is roberta else 1)
    assert len(session.get_outputs()) == 1


def test_the_trainer_logs_the_rates_that_were_used_and_what_the_engine_measures(tmp_path: Path) -> None:
    training = trainer(tmp_path, vit, optim="sgd")
    training.optimizer = small.RecordingAdamW(training.model.parameters(), lr=1e-3)
    RecipeTrainerCallback(training, recipe())
    training.train()
    used = training.optimizer.optimizer.rates
    assert used == pytest.approx([small.lr_of(step) for step in range(1, 41)])
    logged = {line["step"]: line["learning_rate"] for line in training.state.log_history if "learning_rate" in line}
    assert logged == {step: used[step - 1] for step in range(5, 41, 5)}
    losses = [line["step"] for line in training.state.log_history if "loss" in line]
    assert losses == list(range(5, 41, 5))  # none is lost where the engine logs too
    sparsity = {line["step"]: line["sparsity"] for line in training.state.log_history if "sparsity" in line}
    assert (sparsity[10], sparsity[20]) == pytest.approx((0.3, 0.5), abs=1e-2)


def test_accumulation_and_max_steps_count_optimizer_steps(tmp_path: Path) -> None:
    training = trainer(tmp_path, vit, gradient_accumulation_steps=4, max_steps=28)
    callback = RecipeTrainerCallback(training, recipe())
    training.train()
    assert (callback.engine.run.steps_per_epoch, callback.engine.run.total_steps) == (3, 28)
    small.check_trained(callback.engine)


def test_parts_of_epochs(tmp_path: Path) -> None:
    training = trainer(tmp_path, vit, num_train_epochs=3.75)
    callback = RecipeTrainerCallback(training, recipe())
    training.train()
    assert callback.engine.run.total_steps == 38
    small.check_trained(callback.engine)


@pytest.mark.parametrize(("make", "bf16"), [(vit, False), (vit, True), (roberta, False)])
def test_resuming_from_a_checkpoint_folder_is_bit_exact(tmp_path: Path, make: Callable[[], Any], bf16: bool) -> None:
    # the Trainer saves before it evaluates at an epoch's end: with dropout its own resume would not be exact there
    options = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "no", "bf16": bf16}
    training = trainer(tmp_path, make, **options)
    callback = RecipeTrainerCallback(training, recipe())
    training.train()
    for step in (5, 10, 25, 35):
        resumed = trainer(tmp_path / "again", make, **options)
        again = RecipeTrainerCallback(resumed, recipe())
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert small.equal(resumed.model, training.model), step
        small.check_trained(again.engine)
    again.export(tmp_path / "model.onnx")
    assert callback.engine.run.masks.names() == again.engine.run.masks.names()


def test_calibration_takes_no_part_in_mixed_precision(tmp_path: Path) -> None:
    text = f"modifiers: [{{ovit_prune: {{sparsity: 0.5, targets: ['re:.*{TARGET}.weight'], block: 16, gradients: 8}}}}]"
    callbacks = []
    for bf16 in (False, True):
        training = trainer(tmp_path, vit, bf16=bf16, learning_rate=0.0, num_train_epochs=1)
        callbacks.append(RecipeTrainerCallback(training, Recipe.parse(text)))
        training.train()
    assert small.equal(callbacks[0].engine.model, callbacks[1].engine.model)


def test_weights_that_the_trainer_did_not_load_are_not_trained_on(tmp_path: Path) -> None:
    training = trainer(tmp_path, vit, save_strategy="steps", save_steps=5)
    RecipeTrainerCallback(training, recipe())
    del training.model.save_pretrained  # as Transformers does it: under names that it does not find again
    training.train()
    resumed = trainer(tmp_path, vit)
    torch.manual_seed(1)
    resumed.model.apply(resumed.model._init_weights)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.add_(1.0)
    RecipeTrainerCallback(resumed, recipe())
    with pytest.raises(ValueError, match=r"the Trainer did not load \d+ weights of the checkpoint of step 5, such as"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_checkpoint_that_knows_no_recipe_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, vit, save_strategy="epoch", num_train_epochs=1).train()
    resumed = trainer(tmp_path, vit)
    RecipeTrainerCallback(resumed, recipe())
    with pytest.raises(ValueError, match=r"the checkpoint of step 10 was not trained under a recipe"):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_best_model_at_end": True, "save_strategy": "epoch"}, "load_best_model_at_end: it may bring back"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: it changes"),
        ({"restore_callback_states_from_checkpoint": True}, "restore_callback_states_from_checkpoint"),
    ],
)
def test_arguments_that_do_not_go_with_a_recipe(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RecipeTrainerCallback(trainer(tmp_path, vit, **options), recipe())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_distillation_comes_into_the_models_own_loss(tmp_path: Path, accumulate: int) -> None:
    """One step of the Trainer is that of the loss written out here, however many parts its batch has."""
    torch.manual_seed(7)
    teacher = vit()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    options = {"gradient_accumulation_steps": accumulate, "max_steps": 1, "eval_strategy": "no", "max_grad_norm": 0.0}
    made = trainer(tmp_path, vit, optim="sgd", learning_rate=0.1, **options)
    made.get_train_dataloader = lambda: _first(accumulate)  # type: ignore[method-assign,assignment,return-value]
    RecipeTrainerCallback(made, Recipe.parse("modifiers: [{distill: {logits: 2.0}}]"), teacher=teacher)
    made.train()
    assert not made.model._forward_hooks  # type: ignore[union-attr]
    model = vit().train()
    images, classes = small.IMAGES[: 32 * accumulate], small.CLASSES[: 32 * accumulate]
    logits = model(pixel_values=images).logits
    with torch.no_grad():
        wanted = teacher(pixel_values=images).logits
    p, q = logits.log_softmax(1), wanted.log_softmax(1)
    term = 2.0 * (q.exp() * (q - p)).sum(1).mean()
    assert float(term.detach()) > 0.01
    (torch.nn.functional.cross_entropy(logits, classes) + term).backward()
    for (name, ours), theirs in zip(made.model.named_parameters(), model.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.allclose(ours, theirs - 0.1 * theirs.grad, atol=1e-6), name


def _first(parts: int) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(Digits(0, 32 * parts), batch_size=32)  # type: ignore[arg-type]
