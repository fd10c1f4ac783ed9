"""How a term of the loss comes about in any loop: parts of a batch, scalers, checkpoints, compiled models, autocast."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ovit_engine import Engine
from tests.distillation.teaching import (
    IMAGES,
    LABELS,
    cross_entropy,
    engine_for,
    expected,
    gradients,
    learner,
    same,
    started,
    vit,
)


def accumulated(model: Any, engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
    for part in (slice(0, 3), slice(3, 8)):
        yield (
            engine.loss(cross_entropy(model, IMAGES[part], LABELS[part])),
            expected(engine, copy.deepcopy(model), IMAGES[part], LABELS[part]),
        )


def test_each_part_of_a_batch_has_its_own_term() -> None:  # D16
    model = vit()
    engine, _ = started(model)
    for ours, theirs in accumulated(model, engine):
        assert torch.allclose(ours, theirs)


def test_a_scaled_loss_has_a_scaled_term() -> None:  # D16
    model = vit()
    engine, optimizer = started(model)
    assert engine.run.teacher is not None
    reference = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for part in (slice(0, 4), slice(4, 8)):
        loss = engine.loss(cross_entropy(model, IMAGES[part], LABELS[part])) / 2
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        (expected(engine, reference, IMAGES[part], LABELS[part]) / 2).backward()  # type: ignore[no-untyped-call]
    scaler.unscale_(optimizer)
    same([p.grad for p in model.parameters()], [p.grad for p in reference.parameters()])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_checkpointed_activations_count_once(reentrant: bool, whole: bool) -> None:  # D15
    model = vit()
    engine, _ = started(model, tokens=True)
    reference = copy.deepcopy(model)
    if whole and reentrant:
        logits = checkpoint(model, IMAGES.clone().requires_grad_(), use_reentrant=True)
        loss = nn.functional.cross_entropy(logits, LABELS)
        assert engine.loss(loss) is loss  # the model ran without gradients; the next test says what then
        loss.backward()  # type: ignore[no-untyped-call]
        again = torch.zeros((), requires_grad=True)
        assert engine.loss(again) is again  # and with them in the backward pass, of whose inputs the loss is over
        return
    if whole:
        loss = nn.functional.cross_entropy(checkpoint(model, IMAGES, use_reentrant=False), LABELS)
    else:
        for block in model.blocks:
            block.forward = _Checkpointed(block.forward, reentrant)
        loss = cross_entropy(model)
    engine.loss(loss).backward()  # type: ignore[no-untyped-call]
    assert len(learner(engine)._terms) == 1
    again = torch.zeros((), requires_grad=True)
    assert engine.loss(again) is again  # the second forward of the backward pass was none to learn from
    logits = reference(IMAGES)
    with torch.no_grad():
        teacher = engine.run.teacher.module  # type: ignore[union-attr]
        wanted, tokens = teacher(IMAGES), teacher.forward_features(IMAGES)  # type: ignore[operator]
    theirs = nn.functional.cross_entropy(logits, LABELS) + (logits - wanted).square().mean()
    theirs = theirs + (reference.forward_features(IMAGES) - tokens)[:, 1:].square().mean()
    theirs.backward()
    same([p.grad for p in model.parameters()], [p.grad for p in reference.parameters()])


class _Checkpointed:
    def __init__(self, forward: Any, reentrant: bool) -> None:
        self._forward, self._reentrant = forward, reentrant

    def __call__(self, x: Tensor, **kwargs: Any) -> Any:
        return checkpoint(self._forward, x, use_reentrant=self._reentrant, **kwargs)


def test_a_model_that_trains_unseen_is_told() -> None:
    """Whatever keeps the loss from having its term is found after the first step, and not after the training."""
    model = vit()
    _, optimizer = started(model)
    cross_entropy(model).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"the loss had no term of learner: write loss = engine.loss\(loss\)"):
        optimizer.step()


def test_a_criterion_that_the_loop_does_not_call_is_told() -> None:
    model = vit()
    engine = engine_for(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer, criterion=nn.CrossEntropyLoss())
    cross_entropy(model).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="a step was made and the loss had no term of learner"):
        optimizer.step()


def test_a_criterion_adds_the_term() -> None:
    model = vit()
    engine = engine_for(model, teacher=vit(global_pool="avg")).prepare()
    optimizer, criterion = torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss()
    engine.attach(optimizer, criterion=criterion)
    ours, theirs = criterion(model(IMAGES), LABELS), expected(engine, copy.deepcopy(model))
    assert torch.allclose(ours, theirs)
    assert engine.loss(ours) is ours  # both ways at once count once
    ours.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    model.eval()
    with torch.no_grad():
        assert torch.equal(criterion(model(IMAGES), LABELS), cross_entropy(model))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # compiling a hook asks for it
def test_a_compiled_model_is_seen() -> None:
    torch.compiler.reset()
    model = vit(depth=1)
    engine, optimizer = started(model, tokens=True)
    reference = copy.deepcopy(model)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    teacher = engine.run.teacher.module  # type: ignore[union-attr]
    for part in (slice(0, 4), slice(4, 8)):
        optimizer.zero_grad()
        engine.loss(cross_entropy(compiled, IMAGES[part], LABELS[part])).backward()  # type: ignore[no-untyped-call]
        reference.load_state_dict(model.state_dict())
        theirs = expected(engine, reference, IMAGES[part], LABELS[part])
        with torch.no_grad():
            tokens = teacher.forward_features(IMAGES[part])  # type: ignore[operator]
        theirs = theirs + (reference.forward_features(IMAGES[part]) - tokens)[:, 1:].square().mean()
        same([p.grad for p in model.parameters()], gradients(theirs, reference), 1e-5)
        optimizer.step()
    assert len(learner(engine)._terms) == 2


def test_lower_precision() -> None:
    model = vit().to(torch.bfloat16)
    given = vit()
    engine, _ = started(model, teacher=given)
    loss = engine.loss(cross_entropy(model, IMAGES.bfloat16()))
    with torch.no_grad():
        wanted = given(IMAGES.bfloat16().float())
        term = (model(IMAGES.bfloat16()) - wanted).float().square().mean()
    assert torch.allclose(learner(engine)._terms[0], term, rtol=1e-2)
    assert loss.isfinite()


@pytest.mark.parametrize("inside", [True, False])
def test_the_teacher_computes_as_the_student_did(inside: bool) -> None:
    """In mixed precision too where the loss is computed outside of it."""
    model = vit()
    engine, _ = started(model)
    kinds: list[torch.dtype] = []
    engine.run.teacher.module.blocks[0].register_forward_hook(  # type: ignore[union-attr,union-attr,union-attr,index]
        lambda m, a, o: kinds.append(m.mlp.fc1(a[0]).dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IMAGES)
        if inside:
            engine.loss(nn.functional.cross_entropy(logits, LABELS))
    if not inside:
        engine.loss(nn.functional.cross_entropy(logits.float(), LABELS))
    assert kinds == [torch.bfloat16]
