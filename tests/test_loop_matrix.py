"""One recipe (oViT, cyclic learning rate, int8 training) and every kind of loop: what holds after each step."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ovit_engine import Engine
from ovit_engine.quant import quantizers
from tests.devices import DEVICES
from tests.loop_matrix import (
    BACKENDS,
    FREEZE,
    IMAGES,
    LABELS,
    LOOPS,
    QUANTIZE,
    RECIPE,
    STEPS,
    WATCH,
    formula,
    sparsity_at,
)

AVERAGED = ["ema of timm", "ema of torch", "swa of torch"]
EXPORTED = [
    *("plain", "compiled model", "ema of timm", "swa of torch", "ema that attach is not told of", "lookahead"),
    *("tied weights", "parameters without gradient", "channels last"),
]
WARNINGS = {"parameters without gradient": "quantize: spare stayed float, since training never called it"}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The recipe's targets in `model`, chosen here by their ends, each tensor once."""
    ends = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "conv.weight")
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name.endswith(ends) and not name.startswith("patch_embed")
    }


def rates_of(engine: Engine) -> list[float]:
    return [float(group["lr"]) for optimizer in engine.run.optimizers for group in optimizer.param_groups]


def check_sparsity(weights: dict[str, Tensor], step: int) -> None:
    total = sum(weight.numel() for weight in weights.values())
    assert sum(int((weight == 0).sum()) for weight in weights.values()) == round(sparsity_at(step) * total)


def steps_with(steps: Iterator[bool], warning: str | None) -> Iterator[bool]:
    """The loop's steps, in which `warning` is given."""
    with nullcontext() if warning is None else pytest.warns(UserWarning, match=warning):
        yield from steps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LOOPS)
def test_every_loop(name: str, device: str, tmp_path: Path) -> None:
    loop, make = LOOPS[name]
    model = make().to(device)
    engine = Engine(model, RECIPE, steps_per_epoch=STEPS // 2, epochs=2)
    steps = loop(model, engine)
    next(steps)
    ratios = [rate / rates_of(engine)[0] for rate in rates_of(engine)]
    weights, applied, gone = weights_of(model), 0, {}
    for step_applied in steps_with(steps, WARNINGS.get(name)):
        applied += step_applied
        assert engine.run.step == applied
        check_sparsity(weights, applied)
        for key, weight in weights.items():  # what is pruned once stays zero
            assert bool((weight[gone.get(key, weight == 0)] == 0).all()), key
            gone[key] = weight == 0
        if applied:
            assert rates_of(engine) == pytest.approx([formula(applied) * ratio for ratio in ratios])
        for key, quantizer in quantizers(model):
            if key.startswith("spare") and applied >= FREEZE:
                continue
            assert bool(quantizer.enabled) == (applied >= QUANTIZE)
            assert bool(quantizer.observing) == (WATCH <= applied < FREEZE)
        if name in AVERAGED:
            check_copy(model, model.ema[0].module)
    assert applied == STEPS
    engine.detach()
    assert engine.finished
    check_sparsity(weights, applied)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values())
    assert rounded_calls(model) == 4 * len(getattr(model, "blocks", [0]))
    if name in EXPORTED:
        export(engine, model, tmp_path)


@pytest.mark.slow
def test_a_model_compiled_by_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, here in C++."""
    monkeypatch.setitem(BACKENDS, "cpu", "inductor")
    test_every_loop("compiled model", "cpu", tmp_path)


def check_copy(model: nn.Module, copied: nn.Module) -> None:
    """An averaged copy has the same zeros, and ranges with which it computes what the model does, nearly."""
    for (key, weight), other in zip(weights_of(model).items(), weights_of(copied).values(), strict=True):
        assert torch.equal(weight == 0, other == 0), key
    for (key, quantizer), (_, other) in zip(quantizers(model), quantizers(copied), strict=True):
        assert bool(quantizer.enabled) == bool(other.enabled)
        if quantizer.enabled:
            torch.testing.assert_close(quantizer.scale, other.scale, rtol=0.1, atol=0, msg=key)


def rounded_calls(model: nn.Module) -> int:
    """Linear and convolution calls of one forward with an input of 256 values at most and a weight computed before."""
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (nn.functional.linear, torch.conv2d):
                seen.append(len(args[0].unique()) <= 256 and not isinstance(args[1], nn.Parameter))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        model.eval()(IMAGES.to(next(model.parameters())))
    return sum(seen)


def export(engine: Engine, model: Any, folder: Path) -> None:
    """The file holds the zeros of the masks, read without our code."""
    average = next(iter(getattr(model, "ema", [])), None)
    path = folder / "model.onnx"
    engine.export(path, IMAGES[:2], model=None if average is None else average.module, data=[(IMAGES, LABELS)])
    zeros = sum(
        int((numpy_helper.to_array(tensor) == 0).sum())
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1
    )
    masks = [engine.run.masks.get(key) for key in engine.run.masks.names()]
    assert zeros >= sum(int((~mask).sum()) for mask in masks if mask is not None) > 0
