"""Whether a forward pass is one of training or of inference: the transformer says, for all its blocks."""

from typing import Any

import pytest
import torch

from tests.tokens.models import IMAGES, logits
from tests.tokens.training import attached, loss_of, prepared, train, widths

SELECTORS = ["dynamic_vit: {keep: 0.7}", "svite_tokens: {keep: 0.6}", "svite_tokens: {keep: 0.6, masking: zero}"]
LINES = [*SELECTORS, "evit: {keep: 0.5, start: 4st}", "tome: {r: 3}"]
# blocks that are frozen by eval(): some before a stage, one with a stage, some behind, all
FROZEN = [[0], [1], [0, 1], [2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("line", LINES)
def test_blocks_frozen_in_eval_mode_train_as_the_others(line: str, frozen: list[int]) -> None:
    """In a model without dropout nothing else depends on the mode of a block."""
    outputs, losses, grads = [], [], []
    for blocks in ([], frozen):
        model, engine, optimizer = attached(line, drawn=line in SELECTORS)
        model.train()
        for place in blocks:
            model.blocks[place].eval()
        loss = loss_of(engine)
        loss.backward()  # type: ignore[no-untyped-call]
        grads.append([parameter.grad for parameter in model.parameters()])
        optimizer.step()
        outputs.append(logits(model))
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]
    assert torch.equal(*outputs)
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("line", LINES)
def test_a_transformer_in_eval_mode_infers(line: str) -> None:
    """As one that is frozen inside a model which trains, or with blocks that were put in training mode alone."""
    model, _, hooks = prepared(line, drawn=line in SELECTORS)
    expected = logits(model)
    before = widths(model.eval())
    model.blocks.train()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), expected)
    assert widths(model) == before
    assert before[-1] < 17
    assert hooks.survivors is None


@pytest.mark.parametrize("line", LINES)
def test_the_mode_of_the_pass_before_does_not_matter(line: str) -> None:
    """Block 0 in eval mode after a pass in training, as where a user freezes it at some epoch."""

    def losses(freeze: bool) -> list[float]:
        model, engine, optimizer = attached(line, drawn=line in SELECTORS)
        found = train(engine, optimizer, 1)
        model.train()
        if freeze:
            model.blocks[0].eval()
        optimizer.zero_grad()
        loss: Any = loss_of(engine)
        loss.backward()
        optimizer.step()
        return [*found, float(loss.detach())]

    assert losses(True) == losses(False)
