"""The teacher: what it is a copy of, when it is asked, and how a term of the loss comes about in any loop."""

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from ovit_engine import Engine, Modifier, Recipe, Run
from ovit_engine.quant import QuantLinear
from ovit_engine.registry import modifiers
from ovit_engine.teacher import Teacher, logits_of

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4
SIZES = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 4}


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SIZES, **options})


class Learner(Modifier):
    """A term: mean square of what student and teacher differ in, logits and perhaps tokens."""

    name: ClassVar[str] = "learner"
    tokens: bool = False
    _terms: list[Tensor] = PrivateAttr(default_factory=list)
    _asked: int = PrivateAttr(default=0)

    def needs_teacher(self) -> bool:
        return True

    def prepare(self, run: Run) -> None:
        assert run.teacher is not None
        if self.tokens:
            run.teacher.watch_tokens()

    def loss_term(self, run: Run) -> Tensor | None:
        self._asked += 1
        assert run.teacher is not None
        lesson = run.teacher.lesson()
        if lesson is None:
            return None
        term = (logits_of(lesson.student.output) - logits_of(lesson.teacher.output)).float().square().mean()
        if self.tokens:
            assert lesson.student.tokens is not None
            assert lesson.teacher.tokens is not None
            term = term + (lesson.student.tokens - lesson.teacher.tokens).square().mean()
        self._terms.append(term.detach())
        return term


def engine_for(model: nn.Module, *others: Modifier, teacher: nn.Module | None = None, **options: Any) -> Engine:
    recipe = Recipe("taught", (*others, Learner(**options)))
    return Engine(model, recipe, steps_per_epoch=4, epochs=1, teacher=teacher)


def started(model: Any, **options: Any) -> tuple[Engine, torch.optim.Optimizer]:
    other = vit(depth=len(model.blocks))
    with torch.no_grad():  # or student and teacher would be the same, and the term zero
        other.head.weight.add_(1.0)
        other.blocks[0].mlp.fc1.weight.mul_(3.0)
    engine = engine_for(model, **{"teacher": other, **options})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    return engine, optimizer


def learner(engine: Engine) -> Learner:
    found = engine.modifiers[-1]
    assert isinstance(found, Learner)
    return found


def cross_entropy(model: Any, x: Tensor = IMAGES, y: Tensor = LABELS) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def expected(engine: Engine, student: nn.Module, x: Tensor = IMAGES, y: Tensor = LABELS) -> Tensor:
    """The loss by hand, from the two models themselves."""
    assert engine.run.teacher is not None
    logits = student(x)
    with torch.no_grad():
        wanted = engine.run.teacher.module(x)
    loss: Tensor = nn.functional.cross_entropy(logits, y) + (logits - wanted).square().mean()
    return loss


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-6) -> None:
    for own, their in zip(ours, theirs, strict=True):
        assert torch.allclose(own, their, rtol=tolerance, atol=tolerance), float((own - their).abs().max())


def forwards(module: nn.Module) -> list[bool]:
    """Filled with one entry a forward: whether it was in evaluation and without gradients."""
    calls: list[bool] = []
    module.register_forward_hook(lambda m, a, o: calls.append(not m.training and not torch.is_grad_enabled()))
    return calls


def test_it_is_the_model_as_it_was_before_any_surgery() -> None:
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize = modifiers()["quantize"]()
    engine = engine_for(model, quantize).prepare()
    teacher = engine.run.teacher
    assert teacher is not None
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    assert not any(isinstance(module, QuantLinear) for module in teacher.module.modules())
    found = teacher.module.state_dict()
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


def test_it_stays_out_of_the_student_and_of_its_copies() -> None:  # D12
    model = vit()
    names = set(model.state_dict())
    engine, optimizer = started(model)
    teacher = engine.run.teacher
    assert teacher is not None
    model.train()
    engine.loss(cross_entropy(model)).backward()  # type: ignore[no-untyped-call]
    assert not any(module.training for module in teacher.module.modules())
    assert all(not p.requires_grad and p.grad is None for p in teacher.module.parameters())
    assert set(model.state_dict()) == names
    own = {id(tensor) for tensor in teacher.module.parameters()}
    assert not own & {id(p) for p in model.parameters()}
    cross_entropy(model)  # leaves something behind that can't be copied
    for made in (AveragedModel(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(list(made.parameters())) == len(list(model.parameters()))
        assert not own & {id(p) for p in made.parameters()}
        hooks = [h for m in made.modules() for h in m._forward_hooks.values() if "Watch" in repr(h)]
        assert hooks
        assert all(hook.__self__.seen is None for hook in hooks)  # type: ignore[union-attr]
    before = teacher._watch.seen
    copied = copy.deepcopy(model)
    cross_entropy(copied)
    assert teacher._watch.seen is before  # a copy tells its own watch
    optimizer.step()


def test_a_forward_is_asked_about_once_and_by_all_who_want_to_know() -> None:
    model = vit()
    engine = Engine(model, Recipe("two", (Learner(), Learner())), steps_per_epoch=4, epochs=1).prepare()
    assert engine.run.teacher is not None
    calls = forwards(engine.run.teacher.module)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    loss = cross_entropy(model)
    assert calls == []  # nobody has asked
    engine.loss(loss)
    assert calls == [True]
    assert [len(each._terms) for each in engine.modifiers] == [1, 1]  # type: ignore[attr-defined]
    assert engine.loss(loss) is loss  # nothing new was seen
    assert calls == [True]


def test_evaluation_has_no_term_and_costs_no_forward_of_the_teacher() -> None:
    model = vit()
    engine, _ = started(model)
    calls = forwards(engine.run.teacher.module)  # type: ignore[union-attr]
    cross_entropy(model)  # of training, and then left
    with torch.no_grad():
        loss = cross_entropy(model)
        assert engine.loss(loss) is loss
    model.eval()
    loss = cross_entropy(model)
    assert engine.loss(loss) is loss
    assert calls == []


def test_a_batch_that_failed_does_not_reach_the_next() -> None:
    model = vit()
    engine, _ = started(model)
    cross_entropy(model)  # and an exception came before the loss
    broken = model.head.forward
    model.head.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(IMAGES[:2])
    model.head.forward = broken
    loss = torch.zeros((), requires_grad=True)
    assert engine.loss(loss) is loss
    other = IMAGES.flip(0)
    same([engine.loss(cross_entropy(model, other))], [expected(engine, model, other)])


class Broken(Learner):
    """Raises once."""

    name: ClassVar[str] = "broken"

    def loss_term(self, run: Run) -> Tensor | None:
        raise ZeroDivisionError


def test_a_term_that_failed_leaves_nothing_behind() -> None:
    model = vit()
    engine = Engine(model, Recipe("broken", (Broken(),)), steps_per_epoch=4, epochs=1).prepare()
    loss = cross_entropy(model)
    with pytest.raises(ZeroDivisionError):
        engine.loss(loss)
    assert engine.run.teacher is not None
    assert engine.run.teacher.lesson() is None


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


def test_a_teacher_may_be_given() -> None:
    model, other = vit(), vit("vit_tiny_patch16_224", global_pool="avg")
    other.train()
    engine = engine_for(model, teacher=other)
    engine.prepare()
    assert engine.run.teacher is not None
    assert engine.run.teacher.module is other
    assert not other.training
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    engine.loss(cross_entropy(model)).backward()  # type: ignore[no-untyped-call]
    assert learner(engine)._terms[0] > 0


def test_teachers_that_are_none() -> None:
    model = vit()
    with pytest.raises(TypeError, match=r"teacher must be a torch\.nn\.Module, not str"):
        engine_for(model, teacher="same")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the teacher is the model itself: leave it out"):
        engine_for(model, teacher=torch.compile(model))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no modifier of the recipe learns from one: add 'distill'"):
        Engine(model, Recipe("none", ()), steps_per_epoch=1, epochs=1, teacher=vit())
    sharing = vit()
    sharing.blocks = model.blocks
    with pytest.raises(ValueError, match="shares parameters with the model that learns from it"):
        engine_for(model, teacher=sharing).prepare()
    with torch.device("meta"):
        empty = vit()
    with pytest.raises(ValueError, match=r"no weights yet \(meta device\)"):
        engine_for(model, teacher=empty).prepare()
    planned = engine_for(empty).prepare()  # as `ovit validate` does
    empty.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"no weights yet \(meta device\)"):
        planned.attach(torch.optim.SGD(empty.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"the model \(Linear\) has no final norm 'norm' to read tokens from"):
        Teacher(nn.Linear(2, 2), vit()).watch_tokens()
    with pytest.raises(ValueError, match=r"the teacher \(Linear\) has no final norm"):
        Teacher(vit(), nn.Linear(2, 2)).watch_tokens()


def test_it_is_made_before_the_model_is_compiled() -> None:
    model = vit()
    compiled: Any = torch.compile(model, backend="aot_eager")
    assert compiled is not model
    with pytest.raises(RuntimeError, match=r"learner needs a teacher, and the model is compiled already: call engine"):
        engine_for(model).prepare()


def test_weights_loaded_after_prepare_are_told() -> None:
    model = vit()
    engine = engine_for(model).prepare()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.add_(1.0)
    with pytest.raises(
        RuntimeError, match=r"'blocks.1.mlp.fc1.weight' changed after engine.prepare\(\), where the tea"
    ):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1))


def test_other_precision_after_prepare_is_no_change() -> None:
    model = vit()
    engine = engine_for(model).prepare()
    model.bfloat16()
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))


def saved(engine: Engine) -> Any:
    file = io.BytesIO()
    torch.save(engine.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def test_a_resumed_run_has_the_same_teacher() -> None:
    model = vit()
    engine = engine_for(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    engine.loss(cross_entropy(model)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    state = saved(engine)
    again = vit()
    resumed = engine_for(again)
    resumed.load_state_dict(state)
    again.load_state_dict(model.state_dict())
    resumed.attach(torch.optim.SGD(again.parameters(), 0.1))
    assert resumed.run.teacher is not None
    assert resumed.state_dict()["teacher"] == state["teacher"]

    trained = vit()  # the usual mistake: the present weights are loaded first
    trained.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="the engine state was saved with another teacher: give the Engine the same"):
        engine_for(trained).load_state_dict(state)
    with pytest.raises(ValueError, match="the engine state was saved without a teacher"):
        engine_for(vit()).load_state_dict({**state, "teacher": None})


def test_it_goes_when_training_ends() -> None:
    model = vit()
    engine = engine_for(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with engine.attach(optimizer):
        for _ in range(4):
            optimizer.zero_grad()
            engine.loss(cross_entropy(model)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert engine.run.teacher is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    state = saved(engine)
    later = vit()  # for export: its weights are loaded afterwards
    with torch.no_grad():
        later.head.weight.add_(1.0)
    finished = engine_for(later)
    finished.load_state_dict(state)
    assert finished.finished
    assert finished.run.teacher is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in later.modules())


def test_an_exported_copy_has_no_hooks_of_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    engine = engine_for(model).prepare()
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with engine.attach(optimizer, ema=average):
        for _ in range(4):
            optimizer.zero_grad()
            engine.loss(cross_entropy(model)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            average.update_parameters(model)
    seen: list[nn.Module] = []
    monkeypatch.setattr("ovit_engine.deploy.export_model", lambda baked, *_, **named: seen.append(baked))
    engine.export(tmp_path / "m.onnx", IMAGES[:1], model=average)
    assert any(module._forward_hooks for module in average.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in seen[0].modules())
    assert not any(module._forward_pre_hooks_with_kwargs for module in seen[0].modules())


def test_logits_in_outputs() -> None:
    a, b = torch.ones(2, 3), 3 * torch.ones(2, 3)

    class Output:
        logits = a

    assert logits_of(a) is a
    assert logits_of(Output()) is a
    assert logits_of({"logits": a}) is a
    assert torch.equal(logits_of((a, b)), 2 * torch.ones(2, 3))
    for wrong in (None, (a, 1), (a, torch.ones(3)), {"loss": a}, ()):
        with pytest.raises(TypeError, match="no logits in a model's output of type"):
            logits_of(wrong)


def test_an_evaluation_between_a_forward_and_its_loss_changes_nothing() -> None:
    model = vit()
    engine, _ = started(model, tokens=True)
    wanted = engine.loss(cross_entropy(model)).detach()
    loss = cross_entropy(model)
    model.eval()
    model(IMAGES[:2])
    with torch.no_grad():
        model(IMAGES[:3])
    model.train()
    assert torch.equal(engine.loss(loss), wanted)


class Inverting(nn.Module):
    """Changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.neg_())  # type: ignore[no-any-return]


def test_an_input_that_is_changed_in_place_is_told() -> None:
    model = Inverting()
    engine = engine_for(model)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(RuntimeError, match=r"an input of the model was changed in place .* \(x = x.clone\(\)\)"):
        engine.loss(model(torch.randn(3, 4)).sum())


def test_a_loss_of_each_image_is_not_taken() -> None:
    model = vit()
    engine, _ = started(model)
    loss = nn.functional.cross_entropy(model(IMAGES), LABELS, reduction="none")
    with pytest.raises(ValueError, match=r"learner adds a term to the loss of a batch, which is of shape \[8\] here"):
        engine.loss(loss)
