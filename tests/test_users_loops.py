"""Loops as users have them, beside those of the matrix: each prunes and rounds as promised, or says why it does not."""

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from ovit_engine import Engine
from ovit_engine.core.hooks import _Reload
from ovit_engine.quant import quantizers
from tests.loops import X, Y, loss_of, mlp, plain, recipe, zeros

STEPS = 10
PRUNE = "magnitude_prune: {start: 2st, end: 6st, every: 2st, sparsity: {from: 0.25, to: 0.5}, targets: [0.weight]}"
INT8 = "quantize: {start: 7st, freeze_observers: 9st}"
RATE = "cyclic_lr: {max: 0.1, min: 0.01, period: 5st}"
PRUNED = {2: 32, 4: 48, 6: 64}  # of 128, from each step on


def engine_of(model: nn.Module, *lines: str, steps: int = STEPS, **options: Any) -> Engine:
    return Engine(model, recipe(*(lines or (PRUNE, INT8))), steps_per_epoch=steps, epochs=1, **options)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def attached(*lines: str) -> tuple[nn.Sequential, torch.optim.Optimizer, Engine]:
    model = mlp()
    optimizer = sgd(model.parameters())
    return model, optimizer, engine_of(model, *lines).attach(optimizer)


def check(model: Any, engine: Engine, step: int) -> None:
    """The clock, the zeros, the phase of quantization, all by the recipe's times."""
    assert engine.run.step == step
    assert zeros(model[0]) == max((count for time, count in PRUNED.items() if time <= step), default=0)
    assert all(bool(quantizer.enabled) == (step >= 7) for _, quantizer in quantizers(model))


Loop = Iterator[tuple[nn.Module, Engine]]  # after each step


def a_group_added_later() -> Loop:
    """The backbone joins at step 3, after it was pruned for the first time."""
    model = mlp()
    optimizer = sgd(model[2].parameters())
    engine = engine_of(model, PRUNE, INT8, RATE).attach(optimizer)
    for step in range(STEPS):
        if step == 3:
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.05})
        plain(model, optimizer)
        yield model, engine
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second == pytest.approx(first / 2)


class SharpnessAware(torch.optim.Optimizer):
    """SAM as users copy it: a wrapper that moves weights up the gradient, back, and steps the optimizer inside."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.inner = torch.optim.SGD(self.param_groups, 0.1, momentum=0.9)
        self.param_groups = self.inner.param_groups

    def parameters(self) -> list[Any]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def up(self) -> None:
        for parameter in self.parameters():
            self.state[parameter]["old"] = parameter.data.clone()
            parameter.add_(0.05 * parameter.grad)

    @torch.no_grad()
    def down(self) -> None:
        for parameter in self.parameters():
            parameter.data = self.state[parameter]["old"]
        self.inner.step()


def sharpness_aware() -> Loop:
    model = mlp()
    optimizer = SharpnessAware(model.parameters())
    engine = engine_of(model).attach(optimizer)
    for _ in range(STEPS):
        for move in (optimizer.up, optimizer.down):
            model.zero_grad()
            loss_of(model).backward()
            move()
        yield model, engine


def two_steps_a_batch() -> Loop:
    model, optimizer, engine = attached()
    for _ in range(STEPS // 2):
        plain(model, optimizer)
        yield model, engine
        optimizer.step()
        yield model, engine


def validation_amid_accumulation() -> Loop:
    """In inference mode, whose tensors autograd refuses."""
    model, optimizer, engine = attached()
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(2):
            with torch.inference_mode():
                model.eval()(X)
                engine.metric("accuracy", 0.5)
            (loss_of(model.train()) / 2).backward()
        optimizer.step()
        yield model, engine


def weights_to_bfloat16() -> Loop:
    model, optimizer, engine = attached()
    for step in range(STEPS):
        if step == 4:
            model.bfloat16()
        inputs, targets = X.to(model[0].weight.dtype), Y.to(model[0].weight.dtype)  # type: ignore[arg-type]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        yield model, engine
    assert all(quantizer.minimum.dtype == torch.float32 for _, quantizer in quantizers(model))


def frozen_for_a_while() -> Loop:
    model, optimizer, engine = attached()
    for step in range(STEPS):
        if step in (2, 5):
            model[0].requires_grad_(step == 5)
        plain(model, optimizer)
        yield model, engine


def two_models_and_engines() -> Loop:
    """A GAN, whose second model makes three steps to each of the first."""
    model, other = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), mlp()
    first, second = sgd(model.parameters()), torch.optim.SGD(other.parameters(), 0.01)
    engine, besides = engine_of(model).attach(first), engine_of(other, steps=3 * STEPS).attach(second)
    for _ in range(STEPS):
        for _ in range(3):
            second.zero_grad()
            (other(model(X)).sigmoid().mean() - other(X).sigmoid().mean()).backward()
            second.step()
        first.zero_grad()
        (-other(model(X)).sigmoid().mean()).backward()
        first.step()
        yield model, engine
    besides.detach()
    check(other, besides, 3 * STEPS)


def failed_steps() -> Loop:
    """Memory runs out in forward or inside the step, and the loop tries again with halves of the batch."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    engine = engine_of(model, PRUNE, INT8, RATE).attach(optimizer)
    for step in range(STEPS):
        state = optimizer.state
        if step in (3, 5, 8):
            optimizer.zero_grad()
            loss = loss_of(model)
            if step > 3:
                optimizer.state = None  # type: ignore[assignment]
                with pytest.raises(TypeError):
                    loss.backward() or optimizer.step()  # type: ignore[func-returns-value]
        optimizer.state = state
        optimizer.zero_grad()
        for part in range(2):
            (nn.functional.mse_loss(model(X[part::2]), Y[part::2]) / 2).backward()
        optimizer.step()
        yield model, engine


def best_weights_loaded() -> Loop:
    """A state of before pruning and quantization, into the model of a later phase; masks hold at once."""
    model, optimizer, engine = attached()
    best: Any = None
    for step in range(STEPS):
        plain(model, optimizer)
        if step == 0:
            best = copy.deepcopy(model.state_dict())
        if step in (4, 6):
            model.load_state_dict(best)
        yield model, engine


def deterministic() -> Loop:
    torch.use_deterministic_algorithms(True)
    try:
        yield from validation_amid_accumulation()
    finally:
        torch.use_deterministic_algorithms(False)


def double_by_default() -> Loop:
    """A float32 model in a program whose new tensors are float64."""
    model, optimizer, engine = attached()
    torch.set_default_dtype(torch.float64)
    try:
        for _ in range(STEPS):
            plain(model, optimizer)
            yield model, engine
    finally:
        torch.set_default_dtype(torch.float32)


def data_put_in_place_of_data() -> Loop:
    """As offloading does, and some exchange of weights."""
    model, optimizer, engine = attached()
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        plain(model, optimizer)
        yield model, engine


LOOPS: list[Callable[[], Loop]] = [
    *(a_group_added_later, sharpness_aware, two_steps_a_batch, validation_amid_accumulation, weights_to_bfloat16),
    *(frozen_for_a_while, two_models_and_engines, failed_steps, best_weights_loaded, deterministic),
    *(double_by_default, data_put_in_place_of_data),
]


def run(loop: Callable[[], Loop]) -> None:
    for step, (model, engine) in enumerate(loop(), 1):
        check(model, engine, step)
    assert step == STEPS
    engine.detach()
    check(model, engine, STEPS)
    engine.run.masks.check_weights()


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_users_loop(loop: Callable[[], Loop]) -> None:
    run(loop)


def test_training_in_a_thread() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run(validation_amid_accumulation)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_an_average_made_by_hand_from_a_copy_amid_training(tmp_path: Path) -> None:
    """The copy belongs to no engine: it can be trained, loaded, copied, exported with the masks of the run."""
    model, optimizer, engine = attached()
    average: Any = None
    for step in range(STEPS):
        plain(model, optimizer)
        average = copy.deepcopy(model) if step == 4 else average
        if step > 4:
            with torch.no_grad():
                for old, new in zip(average.parameters(), model.parameters(), strict=True):
                    old.lerp_(new, 0.5)
    plain(average, sgd(average.parameters()))
    assert zeros(average[0]) < 64
    hooks = [hook for part in average.modules() for hook in part._load_state_dict_post_hooks.values()]
    for hook in hooks:  # neither a second run in memory, nor the masks of this one
        assert vars(hook.__self__) == vars(_Reload())
    assert hooks
    average.load_state_dict(average.state_dict())
    assert zeros(average[0]) < 64
    engine.detach()
    certificate = engine.export(
        tmp_path / "m.onnx", X[:2], model=average, data=[(X, torch.zeros(64, dtype=torch.long))]
    )
    assert [(layer.zeros >= 64, layer.quantized) for layer in certificate.layers if layer.name == "0.weight"] == [
        (True, True)
    ]


def test_statistics_of_an_averaged_model_move_no_frozen_range() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
    engine = engine_of(model).prepare()
    average = AveragedModel(model)
    optimizer = sgd(model.parameters())
    with engine.attach(optimizer, ema=average):
        for _ in range(STEPS):
            plain(model, optimizer)
            average.update_parameters(model)
    before = {name: quantizer.minimum.clone() for name, quantizer in quantizers(average)}
    update_bn([X[:32], X[32:]], average)
    assert all(torch.equal(quantizer.minimum, before[name]) for name, quantizer in quantizers(average))
    assert int((average.module[0].weight == 0).sum()) == 64


def test_a_teacher_that_shares_layers_with_its_student() -> None:
    teacher, model = mlp(), mlp(1)
    model[2] = teacher[2]
    with pytest.raises(ValueError, match="the teacher shares parameters with the model that learns from it: give a c"):
        engine_of(model, PRUNE, "distill: {logits: 1}", teacher=teacher).prepare()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_interrupt_leaves_the_optimizer_clean_and_export_says_so(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model.parameters())
    engine = engine_of(model)

    def interrupted() -> None:
        with engine.attach(optimizer):
            engine.keep(model.register_forward_hook(lambda *_: None))  # an integration's
            for _ in range(5):
                plain(model, optimizer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not optimizer._optimizer_step_post_hooks  # type: ignore[attr-defined]
    assert not model._forward_hooks
    assert not any(part._load_state_dict_post_hooks or part._load_state_dict_pre_hooks for part in model.modules())
    with pytest.raises(RuntimeError, match="at step 5 of 10, and training was cut short"):
        engine.export(tmp_path / "m.onnx", X[:2])
