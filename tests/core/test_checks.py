"""What the engine refuses in one line: other software's flat buffers, models that move, lost hooks."""

from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import Engine, RecipeError
from ovit_engine.masking.parameters import SCORER
from tests.loops import PRUNE, closure, mlp, recipe
from tests.modifiers.test_contract import SETTINGS, started
from tests.modifiers.test_contract import step as contract_step
from tests.tokens.models import vit


def engine_of(model: nn.Module) -> Engine:
    return Engine(model, recipe(PRUNE), steps_per_epoch=10, epochs=4)


def of_deepspeed(name: str, base: type, module: str) -> Any:
    return type(name, (base,), {"__module__": module})


def test_models_in_deepspeed_are_refused() -> None:
    wrapper = of_deepspeed("DeepSpeedEngine", nn.Sequential, "deepspeed.runtime.engine")
    words = r"the model is in DeepSpeed's engine, where no weight can be masked: use DistributedDataParallel or FSDP2"
    with pytest.raises(TypeError, match=words):
        engine_of(wrapper(mlp()))
    model = mlp()
    engine = engine_of(model)
    model[0].weight.ds_id = 0  # type: ignore[assignment]
    with pytest.raises(TypeError, match="the model is in DeepSpeed ZeRO, where"):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1))


def test_optimizers_of_deepspeed_are_refused_but_for_its_plain_ones() -> None:
    model = mlp()
    engine = engine_of(model)
    zero = of_deepspeed("DeepSpeedZeroOptimizer", object, "deepspeed.runtime.zero.stage_1_and_2")
    with pytest.raises(
        TypeError, match=r"DeepSpeedZeroOptimizer of DeepSpeed keeps weights in flat buffers: use Distri"
    ):
        engine.attach(zero())
    fused = of_deepspeed("FusedAdam", torch.optim.Adam, "deepspeed.ops.adam.fused_adam")
    assert engine.attach(fused(model.parameters())).is_attached


def test_an_averaged_copy_of_before_the_surgery_is_refused() -> None:
    model = mlp()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    engine = Engine(model, recipe("quantize: {start: 2ep}"), steps_per_epoch=10, epochs=4)
    words = "the EMA copy lacks '0.input_quantizer.*', which the model has: make the copy after engine.prepare"
    with pytest.raises(ValueError, match=words):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1), ema=averaged)


def test_an_optimizer_without_steps_is_refused() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer._overlap_with_ddp = True  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"overlap_with_ddp=True.* has no step to follow"):
        engine_of(model).attach(optimizer)


@pytest.mark.parametrize("name", sorted(SETTINGS))
@pytest.mark.parametrize("step", [lambda m, o: o.step(), closure], ids=["step", "closure"])
def test_a_model_that_moves_after_attach_is_told(name: str, step: Any) -> None:
    model, optimizer, engine, calibration = started(name)
    engine.attach(optimizer, calibration=calibration)
    contract_step(engine, model, optimizer)
    model.to("meta")
    with pytest.raises(
        RuntimeError, match=r"^the model moved from cpu to meta after engine.attach, and masks"
    ) as caught:
        step(model, optimizer)
    assert "\n" not in str(caught.value)


def test_a_model_may_move_between_loading_and_attach() -> None:
    model = mlp()
    engine = Engine(model, recipe("magnitude_prune: {sparsity: 0.5, targets: [0.weight]}"), steps_per_epoch=2, epochs=1)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    state = engine.state_dict()
    model = mlp()
    engine = Engine(model, recipe("magnitude_prune: {sparsity: 0.5, targets: [0.weight]}"), steps_per_epoch=2, epochs=1)
    engine.load_state_dict(state)
    model.to("meta")
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    mask = engine.run.masks.get("0.weight")
    assert mask is not None
    assert mask.is_meta


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def test_sync_batch_norm_comes_before_quantizers() -> None:
    model = convolutions()
    engine = Engine(model, recipe("quantize: {}"), steps_per_epoch=4, epochs=1).prepare()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    words = r"quantize: '1' became a new SyncBatchNorm after engine.prepare.*convert it before"
    with pytest.raises(RecipeError, match=words):
        engine.attach(torch.optim.SGD(converted.parameters(), 0.1))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(convolutions())
    engine = Engine(model, recipe("quantize: {}"), steps_per_epoch=4, epochs=1).prepare()
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    model.eval()
    model[1].output_quantizer.enabled.fill_(True)
    model[1].output_quantizer.observed.fill_(True)  # scale 1: whole numbers
    with torch.no_grad():
        rounded = model[:2](torch.randn(2, 1, 8, 8))
    assert torch.equal(rounded, rounded.round())


def test_an_averaged_copy_of_another_width_is_refused() -> None:
    model, other = mlp(), nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
    engine = engine_of(model)
    with pytest.raises(ValueError, match=r"'0\.weight' of the EMA copy is \[4, 8\], of the model \[16, 8\]"):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1), ema=other)


def test_an_optimizer_made_before_prepare_lacks_what_that_adds() -> None:
    model = vit()
    line = recipe("dynamic_vit: {keep: 0.7}")
    early = torch.optim.SGD(model.parameters(), 0.1)
    engine = Engine(model, line, steps_per_epoch=4, epochs=1)
    words = r"the recipe adds parameters that the optimizer lacks: call engine\.prepare\(\) before making it"
    with pytest.raises(RuntimeError, match=words):
        engine.attach(early)
    model = vit()
    engine = Engine(model, line, steps_per_epoch=4, epochs=1).prepare()
    scorers = [parameter for name, parameter in model.named_parameters() if SCORER in name]
    assert scorers
    with pytest.raises(RuntimeError, match=words):  # all but one of them
        engine.attach(torch.optim.SGD([p for p in model.parameters() if p is not scorers[-1]], 0.1))
    engine.attach(torch.optim.SGD([p for p in model.parameters() if p is not scorers[0]], 0.1), scorer(scorers[0]))


def scorer(parameter: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter], 0.1)
