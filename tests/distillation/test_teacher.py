"""The teacher: what it is a copy of, when it is asked, and how a term of the loss comes about in any loop."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ovit_engine import Engine, Recipe, Run
from ovit_engine.core.registry import modifiers
from ovit_engine.distillation.teacher import Teacher, logits_of
from ovit_engine.quant import QuantLinear
from tests.distillation.teaching import (
    IMAGES,
    LABELS,
    Learner,
    cross_entropy,
    engine_for,
    expected,
    forwards,
    learner,
    same,
    started,
    vit,
)


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
        hooks = [h for m in made.modules() for h in m._forward_hooks.values() if "StudentHooks" in repr(h)]
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
    assert engine.run.teacher.outputs() is None


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
    compiled: Any = torch.compile(vit(), backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"learner needs a teacher, and the model is compiled already: call engine"):
        engine_for(compiled).prepare()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # compiling a hook asks for it
def test_a_compiled_wrapper_that_the_user_kept_is_compiled_again_and_seen() -> None:
    torch.compiler.reset()
    model = vit()
    compiled: Any = torch.compile(model, backend="aot_eager")
    compiled(IMAGES)  # compiled without the teacher's hooks
    engine, _ = started(model)
    loss = nn.functional.cross_entropy(compiled(IMAGES), LABELS)
    assert engine.loss(loss) > loss
    assert len(learner(engine)._terms) == 1


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
    monkeypatch.setattr("ovit_engine.export.deploy.export_model", lambda baked, *_, **named: seen.append(baked))
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
