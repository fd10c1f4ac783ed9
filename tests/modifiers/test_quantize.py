"""Int8 quantization-aware training through a recipe."""

import copy
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from ovit_engine import Calibration, Engine, Modifier, Recipe, RecipeError, Run, register
from ovit_engine.quant import QuantConv2d, QuantLinear, quantizers

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
Y = X @ torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3))


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def train(model: nn.Module, engine: Engine, steps: int, x: Tensor = X, y: Tensor = Y, **options: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    engine.attach(optimizer, **options)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def recipe(*modifiers: str) -> Recipe:
    return Recipe.parse("modifiers:\n" + "".join(f"  - {modifier}\n" for modifier in modifiers), file="r.yaml")


def states(model: nn.Module) -> set[tuple[bool, bool]]:
    return {(bool(q.enabled), bool(q.observing)) for _, q in quantizers(model)}


def test_phases_follow_the_clock() -> None:
    model = mlp()
    engine = Engine(model, recipe("quantize: {start: 2st, freeze_observers: 4st}"), steps_per_epoch=6, epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    engine.attach(optimizer)
    seen = []
    for _ in range(6):
        seen.append(states(model))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), Y).backward()
        optimizer.step()
    engine.detach()
    assert seen == [{(False, False)}] * 2 + [{(True, True)}] * 2 + [{(True, False)}] * 2
    assert states(model) == {(True, False)}  # what is evaluated is what will be deployed


def test_before_the_start_not_a_bit_changes() -> None:
    plain, quantized = mlp(), mlp()
    engine = Engine(quantized, recipe("quantize: {start: 5st}"), steps_per_epoch=10, epochs=1)
    train(quantized, engine, 5)
    optimizer = torch.optim.AdamW(plain.parameters(), 0.01)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.mse_loss(plain(X), Y).backward()
        optimizer.step()
    for (name, one), two in zip(plain.named_parameters(), quantized.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_names_and_parameters_stay_and_the_optimizer_made_before_trains_them() -> None:
    model = mlp()
    names, parameters = list(dict(model.named_parameters())), [id(p) for p in model.parameters()]
    before = model[0].weight.detach().clone()
    engine = Engine(model, recipe("quantize: {}"), steps_per_epoch=3, epochs=1)
    train(model, engine, 3)
    assert isinstance(model[0], QuantLinear)
    assert list(dict(model.named_parameters())) == names
    assert [id(p) for p in model.parameters()] == parameters
    assert not torch.equal(model[0].weight, before)


def test_by_default_patch_embedding_and_head_stay_float() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2
    )
    Engine(model, recipe("quantize: {}"), steps_per_epoch=3, epochs=1).prepare()
    quantized = [name for name, module in model.named_modules() if isinstance(module, (QuantLinear, QuantConv2d))]
    assert quantized == [f"blocks.{i}.{n}" for i in range(2) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def test_targets_take_layer_or_weight_names_and_exclude_spares() -> None:
    model = mlp()
    text = "quantize: {targets: ['re:.*\\.weight|0|2|4'], exclude: ['2']}"
    Engine(model, recipe(text), steps_per_epoch=3, epochs=1).prepare()
    assert [isinstance(model[i], QuantLinear) for i in (0, 2, 4)] == [True, False, True]


def test_masks_hold_through_quantization_and_zeros_stay_zero() -> None:
    model = mlp()
    steps = recipe(
        "ovit_prune: {start: 2st, sparsity: 0.5, targets: ['0.weight', '2.weight'], block: 16, gradients: 8, "
        "images_per_gradient: 4, damp: 1.0e-4}",
        "quantize: {start: 4st}",
    )
    engine = Engine(model, steps, steps_per_epoch=8, epochs=1)
    data = torch.utils.data.TensorDataset(X, Y)
    train(model, engine, 8, calibration=Calibration(data, nn.functional.mse_loss))
    engine.detach()
    assert sum(int((model[i].weight == 0).sum()) for i in (0, 2)) == round(0.5 * (8 * 16 + 16 * 16))
    for index in (0, 2):
        rounded = model[index].weight_quantizer(model[index].weight)
        assert bool((rounded[model[index].weight == 0] == 0).all())


def test_calibration_inside_the_quantized_phase_moves_no_range() -> None:
    model = mlp()
    steps = recipe(
        "quantize: {start: 1st}",
        "ovit_prune: {start: 3st, sparsity: 0.5, targets: ['0.weight'], block: 16, gradients: 4, "
        "images_per_gradient: 4, damp: 1.0e-4}",
    )
    engine = Engine(model, steps, steps_per_epoch=8, epochs=1)
    data = torch.utils.data.TensorDataset(1000 * X, Y)
    train(model, engine, 3, calibration=Calibration(data, nn.functional.mse_loss))
    assert float(model[0].input_quantizer.scale) < 1


def test_batch_norm_statistics_freeze() -> None:
    model = convnet()
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    y = torch.randn(16, 3, generator=torch.Generator().manual_seed(3))
    engine = Engine(model, recipe("quantize: {start: 1st, freeze_batch_norm: 3st}"), steps_per_epoch=6, epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    engine.attach(optimizer)
    means = []
    for _ in range(6):
        model.train()
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        means.append(model[1].running_mean.clone())
    assert not torch.equal(means[1], means[2])
    assert torch.equal(means[3], means[5])


def test_the_ema_copy_follows() -> None:
    model = mlp()
    engine = Engine(model, recipe("quantize: {start: 2st, freeze_observers: 3st}"), steps_per_epoch=4, epochs=1)
    engine.prepare()
    average = copy.deepcopy(model)
    train(model, engine, 4, ema=average)
    engine.detach()
    assert states(average) == {(True, False)}
    assert torch.equal(average[0].input_quantizer.scale, model[0].input_quantizer.scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{targets: [nope]}", "r.yaml:2:25: quantize.targets: target 'nope' matches no Linear or Conv2d layer of Seq"),
        ("{targets: ['0'], exclude: ['re:fc.*']}", "r.yaml:2:41: quantize.exclude: target 're:fc.*' matches no"),
        ("{start: 9st}", "r.yaml:2:23: quantize.start: '9st' is the end of training"),
        ("{start: 3st, freeze_observers: 3st}", "does not come after the start"),
        ("{start: 3st, start_observers: 4st}", "r.yaml:2:45: quantize.start_observers: '4st' comes after the start at"),
        ("{weights: {bits: 4}}", "r.yaml:2:32: quantize.weights.bits: input should be 7 or 8: 4"),
    ],
)  # fmt: skip
def test_bad_options_say_where(options: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        Engine(mlp(), recipe(f"quantize: {options}"), steps_per_epoch=9, epochs=1).prepare()


def test_a_model_with_nothing_to_quantize() -> None:
    with pytest.raises(RecipeError, match="LayerNorm has no Linear or Conv2d layer to quantize"):
        Engine(nn.LayerNorm(4), recipe("quantize: {}"), steps_per_epoch=9, epochs=1).prepare()


def test_two_quantizers_of_one_layer_conflict() -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml:3:5: quantize: already prepared for quantization: 0, 2, 4"):
        Engine(mlp(), recipe("quantize: {}", "quantize: {}"), steps_per_epoch=9, epochs=1).prepare()


def test_training_that_ends_before_quantization_raises() -> None:
    model = mlp()
    engine = Engine(model, recipe("quantize: {start: 5st}"), steps_per_epoch=100, epochs=1)
    train(model, engine, 4)
    with pytest.raises(RuntimeError, match="the optimizer applied 4 of 100 steps"):
        engine.detach()


def test_surgery_on_a_compiled_model_says_where_to_put_the_line() -> None:
    compiled = torch.compile(mlp(), backend="eager")
    with pytest.raises(RuntimeError, match=r"compiled already: call engine.prepare\(\) before that line"):
        Engine(compiled, recipe("quantize: {}"), steps_per_epoch=9, epochs=1).prepare()


@pytest.mark.parametrize("cut", [2, 3, 4])
def test_batch_norm_stays_frozen_where_training_is_resumed(cut: int) -> None:
    text = "quantize: {start: 1st, freeze_batch_norm: 3st}"
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    y = torch.randn(16, 3, generator=torch.Generator().manual_seed(3))
    model = convnet()
    engine = Engine(model, recipe(text), steps_per_epoch=6, epochs=1)
    train(model, engine, cut, x, y)
    resumed = convnet()
    later = Engine(resumed, recipe(text), steps_per_epoch=6, epochs=1)
    later.load_state_dict(engine.state_dict())
    resumed.load_state_dict(model.state_dict())
    train(resumed, later, 3 - min(cut, 3), x, y)
    mean = resumed[1].running_mean.clone()
    resumed.train()(x)
    assert torch.equal(resumed[1].running_mean, mean)


def test_an_ema_copy_made_before_the_layers_were_is_told_where_to_go() -> None:
    model = mlp()
    average = copy.deepcopy(model)
    engine = Engine(model, recipe("quantize: {}"), steps_per_epoch=4, epochs=1)
    engine.attach(torch.optim.SGD(model.parameters(), 0.01))
    with pytest.raises(RuntimeError, match=r"made before its layers were: call engine.prepare\(\) before that line"):
        engine.apply_to(average)


@register("interrupts_once")
class InterruptsOnce(Modifier):
    """Stands before others in a recipe and is interrupted at the end of one step, as by Ctrl-C in a notebook."""

    at: int = Field(description="the step")

    _happened: bool = PrivateAttr(default=False)

    def step_end(self, run: Run) -> None:
        if run.step == self.at and not self._happened:
            self._happened = True
            raise KeyboardInterrupt


def test_a_phase_whose_step_was_interrupted_comes_at_the_next() -> None:
    model = mlp()
    text = ("interrupts_once: {at: 2}", "quantize: {start: 2st, freeze_observers: 4st}")
    engine = Engine(model, recipe(*text), steps_per_epoch=6, epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    engine.attach(optimizer)
    for step in range(6):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), Y).backward()
        with pytest.raises(KeyboardInterrupt) if step == 1 else nullcontext():
            optimizer.step()
    engine.detach()
    assert states(model) == {(True, False)}


@pytest.mark.filterwarnings("ignore:quantize. 1 NonDynamicallyQuantizableLinear")
@pytest.mark.parametrize(
    "layer", [nn.MultiheadAttention(8, 2), nn.ConvTranspose2d(8, 8, 3), nn.Conv1d(8, 8, 3), nn.GRU(8, 8)]
)
def test_other_layers_with_weights_are_named_as_float(layer: nn.Module) -> None:
    model = nn.Sequential(mlp(), layer)
    with pytest.warns(UserWarning, match=rf"weights of 1 {type(layer).__name__} \('1'\) stay float"):
        Engine(model, recipe("quantize: {start: 1st}"), steps_per_epoch=2, epochs=1).prepare()
