"""Gradient checkpointing of models whose tokens are reduced: blocks that run again do what they did."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from tests.tokens.models import IMAGES, logits
from tests.tokens.training import LABELS, attached, loss_of, prepared, train

SELECTORS = ["dynamic_vit: {keep: 0.7}", "svite_tokens: {keep: 0.6}"]
BETWEEN = ["evit: {keep: 0.5, start: 0st, end: 4st}", "tome: {r: 3}"]
LINES = SELECTORS + BETWEEN


def gradients(line: str, checkpointing: bool, passes: int) -> list[Tensor]:
    """Of the third step, made of some forward and backward passes with inference between them."""
    model, engine, optimizer = attached(line, drawn=line in SELECTORS)
    model.set_grad_checkpointing(checkpointing)
    train(engine, optimizer, 2)
    model.zero_grad()
    for number in range(passes):
        loss = loss_of(engine, IMAGES[: 6 - number])
        left = model._token_hooks.survivors
        assert left is not None
        assert len(left.origin) == 6 - number
        logits(model)
        model.train()
        loss.backward()  # type: ignore[no-untyped-call]
        assert model._token_hooks.survivors is left or line in SELECTORS
    assert float(engine.loss(torch.zeros(()))) == 0  # no term comes twice
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("line", LINES)
def test_checkpointing_changes_nothing(line: str, passes: int) -> None:
    plain, checkpointed = gradients(line, False, passes), gradients(line, True, passes)
    assert sum(float(grad.abs().sum()) for grad in plain) > 0
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("line", LINES)
def test_two_passes_before_backward(line: str) -> None:
    """What evit drops depends on nothing that a pass leaves behind; the others lose it to the second pass."""
    found = []
    for checkpointing in (False, True):
        model, _, _ = prepared(line, drawn=line in SELECTORS)
        model.set_grad_checkpointing(checkpointing)
        model.train()
        loss = cross_entropy(model(IMAGES), LABELS) + cross_entropy(model(IMAGES[:3]), LABELS[:3])
        if checkpointing and not line.startswith("evit"):
            with pytest.raises(RuntimeError, match="needs backward after each forward pass"):
                loss.backward()  # type: ignore[no-untyped-call]
            continue
        loss.backward()  # type: ignore[no-untyped-call]
        found.append([parameter.grad for parameter in model.parameters()])
    if len(found) == 2:
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("line", LINES)
def test_a_pass_without_gradients_before_the_step_is_no_pass(line: str) -> None:
    """As one that shows what training keeps."""
    model, engine, optimizer = attached(line)
    model.set_grad_checkpointing(True)
    model.train()
    with torch.no_grad():
        model(IMAGES)
    train(engine, optimizer, 1)
    with torch.no_grad():
        model(IMAGES)
    train(engine, optimizer, 1)


@pytest.mark.parametrize("line", LINES)
def test_a_pass_without_gradients_between_forward_and_backward(line: str) -> None:
    """The right gradients, or words: never those of the other pass."""
    model, engine, _ = attached(line, drawn=line in SELECTORS)
    model.set_grad_checkpointing(True)
    model.train()
    loss = loss_of(engine)
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    model._token_hooks.end_step(0)
    loss = loss_of(engine)
    with torch.no_grad():
        model(IMAGES.flip(0)[:4])
    if line in SELECTORS:
        with pytest.raises(RuntimeError, match=r"make no forward pass in training mode under torch.no_grad\(\)"):
            loss.backward()  # type: ignore[no-untyped-call]
        return
    loss.backward()  # type: ignore[no-untyped-call]
    for wanted, parameter in zip(expected, model.parameters(), strict=True):
        assert wanted is parameter.grad is None or torch.equal(wanted, parameter.grad)


def partly(model: torch.nn.Module, images: Tensor, again: set[int]) -> Tensor:
    """Logits, with checkpoints around the blocks in `again`."""
    tokens = model._pos_embed(model.patch_embed(images))  # type: ignore[operator]
    for number, block in enumerate(model.blocks):  # type: ignore[arg-type]
        tokens = checkpoint(block, tokens, use_reentrant=False) if number in again else block(tokens)
    output: Tensor = model.forward_head(model.norm(tokens))  # type: ignore[operator]
    return output


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("again", [{2}, {3}, {0}])
def test_some_blocks_alone(line: str, again: set[int]) -> None:
    """Two passes and their backwards; block 2 holds the second stage, 3 none but the masks of the one before."""
    line = line.replace("keep: 0.7", "keep: 0.7, blocks: [1, 2]").replace("keep: 0.5", "keep: 0.5, blocks: [1, 2]")
    found = []
    for blocks in (set(), again):
        model, _, _ = attached(line, drawn=line.startswith(("dynamic", "svite")))
        model.train()
        for part in (IMAGES[:4], IMAGES[2:]):
            cross_entropy(partly(model, part, blocks), LABELS[:4]).backward()  # type: ignore[no-untyped-call]
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("line", SELECTORS)
def test_masks_of_another_pass_are_never_taken(line: str) -> None:
    """Also where no scorer runs again, only a block behind it."""
    model, _, _ = prepared(line, drawn=True)
    model.train()
    loss = sum(cross_entropy(partly(model, part, {2}), LABELS[:3]) for part in (IMAGES[:3], IMAGES[3:]))
    with pytest.raises(RuntimeError, match="needs backward after each forward pass"):
        loss.backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("line", LINES)
def test_reentrant_checkpointing(line: str) -> None:
    """It runs blocks without gradients first: scorers could not learn, and what has none is as it was."""
    found = []
    for reentrant in (None, True):
        model, _, _ = prepared(line.replace("keep: 0.7", "keep: 0.7, blocks: [1, 2]"), drawn=line in SELECTORS)
        model.train()
        tokens = model._pos_embed(model.patch_embed(IMAGES))
        for block in model.blocks:
            tokens = block(tokens) if reentrant is None else checkpoint(block, tokens, use_reentrant=True)
        loss = cross_entropy(model.forward_head(model.norm(tokens)), LABELS)
        if reentrant and line in SELECTORS:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                loss.backward()  # type: ignore[no-untyped-call]
            continue
        loss.backward()  # type: ignore[no-untyped-call]
        found.append([parameter.grad for parameter in model.parameters()])
    if len(found) == 2:
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("line", LINES)
def test_a_pass_that_is_thrown_away(line: str) -> None:
    """A loop leaves a batch out: the next one, whose loss takes its name, has the gradients that it has alone."""
    found = []
    for thrown in (False, True):
        model, engine, _ = attached(line, drawn=line in SELECTORS)
        model.set_grad_checkpointing(True)
        model.train()
        if thrown:
            loss = loss_of(engine, IMAGES.flip(0))
        model._token_hooks._calls = 0  # the same noise
        loss = loss_of(engine)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("line", [*SELECTORS, BETWEEN[1]])
def test_a_pass_that_is_held(line: str) -> None:
    """Nothing tells whether it is the one that is run again."""
    model, engine, _ = attached(line)
    model.set_grad_checkpointing(True)
    model.train()
    held = loss_of(engine)
    with pytest.raises(RuntimeError, match="of one that gets none, let go of the outputs and the loss before the next"):
        loss_of(engine).backward()  # type: ignore[no-untyped-call]
    del held
    loss_of(engine).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("line", [*SELECTORS, BETWEEN[1]])
def test_an_earlier_pass_whose_decisions_are_gone(line: str) -> None:
    """The one after it was thrown away, and has overwritten them."""
    model, engine, _ = attached(line)
    model.set_grad_checkpointing(True)
    model.train()
    loss = loss_of(engine)
    loss_of(engine, IMAGES.flip(0))
    with pytest.raises(RuntimeError, match="needs backward after each forward pass in training mode"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("line", LINES)
def test_eval_between_forward_and_backward(line: str) -> None:
    model, engine, _ = attached(line)
    model.set_grad_checkpointing(True)
    model.train()
    loss = loss_of(engine)
    model.eval()
    with pytest.raises(
        RuntimeError, match=r"a block again in eval mode, .* one of training: call model.eval\(\) after"
    ):
        loss.backward()  # type: ignore[no-untyped-call]
    del loss
    cross_entropy(model(IMAGES), LABELS).backward()  # type: ignore[no-untyped-call]  # both in eval mode
    model.train()
    loss_of(engine).backward()  # type: ignore[no-untyped-call]
