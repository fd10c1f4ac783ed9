"""Models whose tokens are reduced in the loops that users write: scalers, compilers, averages, checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovit_engine import Engine
from ovit_engine.tokens import hooks_of
from tests.loop_matrix import IMAGES, LOOPS, STEPS, small_vit
from tests.loops import recipe
from tests.tokens.models import IMAGES as SMALL
from tests.tokens.models import logits
from tests.tokens.training import attached, loss_of, train, widths

# of 16 patches
LINES = {
    "dynamic_vit": "dynamic_vit: {keep: 0.6, blocks: [0]}",
    "svite_tokens": "svite_tokens: {keep: 0.6}",
    "evit": "evit: {keep: 0.6, blocks: [0], start: 4st, end: 12st}",
    "tome": "tome: {r: 3}",
}
# those whose loops call engine.prepare() come last
KINDS = ["fp16, scaler", "fp16, scaler, fused, unscale", "closure", "bf16 weights", "ema of timm"]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], list[float]]:
    """Has `cross_entropy` of the loops be `engine.loss(cross_entropy)`; returns the losses."""

    def tell(engine: Engine) -> list[float]:
        plain, losses = nn.functional.cross_entropy, []

        def with_terms(outputs: Tensor, targets: Tensor) -> Tensor:
            loss = engine.loss(plain(outputs, targets))
            losses.append(float(loss.detach()))
            return loss

        monkeypatch.setattr(nn.functional, "cross_entropy", with_terms)
        return losses

    return tell


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LINES)
def test_every_loop(name: str, kind: str, told: Callable[[Engine], list[float]]) -> None:
    loop, model = LOOPS[kind][0], small_vit()
    engine = Engine(model, recipe(LINES[name]), steps_per_epoch=STEPS // 2, epochs=2)
    if kind in KINDS[:3]:
        engine.prepare()
    losses = told(engine)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    applied = sum(loop(model, engine))
    assert engine.run.step == applied == STEPS
    engine.detach()
    assert len(losses) >= STEPS
    assert all(torch.tensor(losses).isfinite())
    assert sum(losses[-4:]) < sum(losses[:4])  # it learns
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    moved = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before.get(key, 0 * tensor))]
    assert len(moved) == len(model.state_dict())  # scorers learn too
    copies = [model, *(average.module for average in getattr(model, "ema", []))]
    expected = widths_of(model)
    for each in copies:
        assert widths_of(each) == expected
        assert expected[-1] < 17
        assert hooks_of(each) is not None


def widths_of(model: Any) -> list[int]:
    images = IMAGES[:2].to(next(model.parameters()).dtype)
    return widths(model.eval(), images)


# dynamic_vit's and svite_tokens' decisions stay outside of the graph, so training is compiled in parts
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", LINES)
def test_compiled_training_is_the_same_and_inference_is_one_graph(name: str) -> None:
    found = []
    for compiled in (False, True):
        model, engine, optimizer = attached(LINES[name], depth=1, steps=12)
        network: Any = model
        if compiled:
            network = torch.compile(model, backend="aot_eager", fullgraph=name in ("evit", "tome"))
        found.append(train(engine, optimizer, 3, network))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    model.eval()
    with torch.no_grad():
        whole = torch.compile(model, backend="eager", fullgraph=True)(SMALL)
    assert torch.allclose(whole, logits(model), atol=1e-6)
    # frozen by eval() the blocks are compiled again, or not at all, and compute the same
    model.train()
    before = float(loss_of(engine, network=model).detach())
    model._token_hooks.end_step(engine.run.step)
    model.blocks.eval()
    assert float(loss_of(engine, network=network).detach()) == pytest.approx(before, rel=1e-5)
