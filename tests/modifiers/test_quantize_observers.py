"""What observers see, when, and in which copies of the model."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ovit_engine import Clock, Engine, RecipeError
from ovit_engine.quant import quantizers
from tests.loops import X, Y, mlp, plain, recipe


def states(model: nn.Module) -> set[tuple[bool, bool]]:
    return {(bool(q.enabled), bool(q.observing)) for _, q in quantizers(model)}


def train(model: nn.Module, engine: Engine, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    engine.attach(optimizer)
    for _ in range(steps):
        plain(model, optimizer)


def test_observers_may_watch_before_rounding_starts() -> None:
    model = mlp()
    text = "quantize: {start_observers: 1st, start: 3st, freeze_observers: 4st}"
    engine = Engine(model, recipe(text), steps_per_epoch=6, epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    engine.attach(optimizer)
    seen, scales = [], []
    for step in range(6):
        seen.append(states(model))
        optimizer.zero_grad()
        nn.functional.mse_loss(model((step + 1) * X), Y).backward()
        optimizer.step()
        scales.append(float(model[0].input_quantizer.scale))
    engine.detach()
    assert seen == [{(False, False)}, *2 * [{(False, True)}], {(True, True)}, *2 * [{(True, False)}]]
    span = float(X.max() - X.min()) / 255  # of a batch; batches of steps 1, 2 and 3 are 2, 3 and 4 times as large
    averages = [2.0, 2.0 + 0.05 * 1.0, 2.05 + 0.05 * 1.95]
    assert scales == pytest.approx([1.0, *(span * average for average in averages), *2 * [span * averages[-1]]])


def test_watching_changes_not_a_bit_of_training() -> None:
    results = []
    for text in ("quantize: {start: 9st}", "quantize: {start_observers: 2st, start: 9st}"):
        model = mlp()
        train(model, Engine(model, recipe(text), steps_per_epoch=10, epochs=1), 8)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_watching_goes_on_where_training_is_resumed(cut: int) -> None:
    text = "quantize: {start_observers: 2st, start: 4st, freeze_observers: 5st}"
    whole, model, resumed = mlp(), mlp(), mlp()
    train(whole, Engine(whole, recipe(text), steps_per_epoch=6, epochs=1), 6)
    engine = Engine(model, recipe(text), steps_per_epoch=6, epochs=1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    engine.attach(optimizer)
    later = Engine(resumed, recipe(text), steps_per_epoch=6, epochs=1)
    second = torch.optim.AdamW(resumed.parameters(), 0.01)
    for step in range(6):
        if step == cut:
            later.load_state_dict(engine.state_dict())
            resumed.load_state_dict(model.state_dict())
            second.load_state_dict(optimizer.state_dict())
            later.attach(second)
        current, stepped = (model, optimizer) if step < cut else (resumed, second)
        stepped.zero_grad()
        nn.functional.mse_loss(current(X), Y).backward()
        stepped.step()
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_the_timeline_tells_when_observers_start() -> None:
    rows = list(
        recipe("quantize: {start_observers: 1st, start: 3st}").modifiers[0].timeline(Clock(6, 6)),
    )
    assert rows[:2] == [
        (1, "quantization", "observers start"),
        (3, "quantization", "int8 fake-quantization starts"),
    ]


class Branched(nn.Module):
    """A layer that is used, one that never is, and one that only evaluation uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.never, self.late = nn.Linear(8, 1), nn.Linear(8, 3), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y if self.training else y + 0.01 * self.late(y)


def test_a_layer_that_training_never_calls_stays_float_and_the_file_is_right(tmp_path: Path) -> None:
    model = Branched()
    engine = Engine(model, recipe("quantize: {start: 1st, freeze_observers: 3st}"), steps_per_epoch=5, epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    engine.attach(optimizer)
    for step in range(1, 6):
        words = "never, late stayed float, since training never called them: name such layers in 'exclude'"
        nn.functional.mse_loss(model.train()(X), Y).backward()
        with pytest.warns(UserWarning, match=words) if step == 3 else nullcontext():
            optimizer.step()
        model.eval()(X)
    engine.detach()
    certificate = engine.export(tmp_path / "model.onnx", X[:1], data=[(X, Y)])
    assert {layer.name: layer.quantized for layer in certificate.layers} == {"used.weight": True, "late.weight": False}
    assert [layer.name for layer in certificate.promise.layers] == ["used.weight"]


def test_a_model_that_trains_in_eval_mode_is_told_when_observers_freeze() -> None:
    model = mlp().eval()
    engine = Engine(model, recipe("quantize: {start: 1st, freeze_observers: 3st}"), steps_per_epoch=5, epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    engine.attach(optimizer)
    for step in range(3):
        nn.functional.mse_loss(model(X), Y).backward()
        with pytest.raises(RecipeError, match=r"no layer was called in training.*\(\)") if step == 2 else nullcontext():
            optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("freeze", [2, 5], ids=["frozen", "observing"])
def test_checkpointing_changes_neither_gradients_nor_ranges(reentrant: bool, freeze: int) -> None:
    results = []
    for checkpointed in (False, True):
        model = mlp()
        text = f"quantize: {{start: 1st, freeze_observers: {freeze}st}}"
        engine = Engine(model, recipe(text), steps_per_epoch=6, epochs=1)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        engine.attach(optimizer)
        for step in range(6):
            optimizer.zero_grad()
            x = ((step + 1) * X).requires_grad_()
            y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            nn.functional.mse_loss(y, Y).backward()
            optimizer.step()
        results.append({**model.state_dict(), **{name: p.grad for name, p in model.named_parameters()}})
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


@pytest.mark.parametrize("start", ["start: 2st", "start_observers: 2st, start: 4st"])
def test_the_ema_copy_computes_what_the_model_does_while_observers_watch(start: str) -> None:
    """An average of scales that begin at one is no scale."""
    model = mlp()
    engine = Engine(model, recipe(f"quantize: {{{start}, freeze_observers: 7st}}"), steps_per_epoch=8, epochs=1)
    engine.prepare()
    average: Any = ModelEmaV3(model, decay=0.99)
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    engine.attach(optimizer, ema=average)
    for step in range(8):
        optimizer.zero_grad()
        nn.functional.mse_loss(model.train()((1 + step / 50) * X), Y).backward()
        optimizer.step()
        average.update(model)
        if step > 1:  # the step at which they start was made before
            torch.testing.assert_close(average.module(X), model.eval()(X), rtol=0, atol=0.02)
        if step >= 6:  # frozen: the same numbers from here on
            assert torch.equal(average.module[0].input_quantizer.scale, model[0].input_quantizer.scale)
    engine.detach()
