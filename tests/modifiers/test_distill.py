"""Distillation in any loop: the term is what the two models themselves give, once a forward, in its time."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ovit_engine import Engine, RecipeError
from ovit_engine.modifiers.distill import Distill
from ovit_engine.tokens import Survivors, TokenHooks, find_layout
from tests.loops import recipe

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4
SIZES = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 4}


def vit(seed: int = 0, name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(name, **{**SIZES, **options})


def engine_for(model: nn.Module, options: str, teacher: nn.Module | None = None, steps: int = 6) -> Engine:
    text = recipe(f"distill: {options}")
    return Engine(model, text, steps_per_epoch=steps, epochs=1, teacher=teacher)


def train(engine: Engine, model: Any, optimizer: torch.optim.Optimizer, steps: int = 1) -> list[float]:
    """What the loss of each step has besides cross-entropy."""
    terms = []
    for _ in range(steps):
        optimizer.zero_grad()
        plain = nn.functional.cross_entropy(model(IMAGES), LABELS)
        loss = engine.loss(plain)
        terms.append(float((loss - plain).detach()))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return terms


def attached(model: Any, options: str, teacher: nn.Module | None) -> tuple[Engine, torch.optim.Optimizer]:
    engine = engine_for(model, options, teacher)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    return engine, optimizer


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> float:
    p, q = (student.double() / temperature).softmax(1), (teacher.double() / temperature).softmax(1)
    return float(temperature**2 * (q * (q / p).log()).sum() / len(q))


@torch.no_grad()
def logits(*models: nn.Module) -> list[Tensor]:
    return [copy.deepcopy(model).eval()(IMAGES) for model in models]


def test_terms_by_hand() -> None:
    model, teacher = vit(0), vit(1)
    ours, theirs = logits(model, teacher)
    engine, optimizer = attached(model, "{}", teacher)
    assert train(engine, model, optimizer) == [pytest.approx(0.5 * divergence(ours, theirs), rel=1e-4)]
    engine, optimizer = attached(model := vit(0), "{logits: 2, temperature: 3}", vit(1))
    assert train(engine, model, optimizer) == [pytest.approx(2 * divergence(ours, theirs, 3), rel=1e-4)]
    engine, optimizer = attached(model := vit(0), "{logits: 1, hard: true}", vit(1))
    wanted = nn.functional.cross_entropy(ours, theirs.argmax(1))
    assert train(engine, model, optimizer) == [pytest.approx(float(wanted), rel=1e-4)]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_tokens_by_hand(name: str) -> None:
    """Patch tokens alone: the class token, and that of distillation, answer to the logits."""
    model, teacher = vit(0, name), vit(1, name)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        ours, theirs = model.forward_features(IMAGES)[:, prefix:], teacher.forward_features(IMAGES)[:, prefix:]
    engine, optimizer = attached(model, "{logits: 0, tokens: 0.25}", teacher)
    assert train(engine, model, optimizer) == [pytest.approx(0.25 * float((ours - theirs).square().mean()), rel=1e-4)]


def test_a_teacher_with_other_prefix_tokens_teaches_patches() -> None:
    model, teacher = vit(0), vit(1, "deit_tiny_distilled_patch16_224")
    with torch.no_grad():
        ours, theirs = model.forward_features(IMAGES)[:, 1:], teacher.forward_features(IMAGES)[:, 2:]
    engine, optimizer = attached(model, "{logits: 0, tokens: 1}", teacher)
    assert train(engine, model, optimizer) == [pytest.approx(float((ours - theirs).square().mean()), rel=1e-4)]


def test_two_heads_learn_by_their_mean() -> None:
    model, teacher = vit(0, "deit_tiny_distilled_patch16_224"), vit(1)
    model.set_distilled_training(True)
    with torch.no_grad():
        first, second = model.train()(IMAGES)
        theirs = teacher(IMAGES)
    engine, optimizer = attached(model, "{logits: 1}", teacher)
    loss = engine.loss(nn.functional.cross_entropy(model(IMAGES)[0], LABELS))
    plain = nn.functional.cross_entropy(first, LABELS)
    assert float((loss - plain).detach()) == pytest.approx(divergence((first + second) / 2, theirs), rel=1e-3)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.any() for p in (model.head.weight, model.head_dist.weight))
    optimizer.step()


def test_only_in_its_time() -> None:
    model, teacher = vit(0), vit(1)
    calls: list[int] = []
    engine, optimizer = attached(model, "{start: 2st, end: 4st}", teacher)
    teacher.register_forward_hook(lambda m, a, o: calls.append(engine.run.step))
    terms = train(engine, model, optimizer, steps=6)
    assert [term != 0 for term in terms] == [False, False, True, True, False, False]
    assert calls == [2, 3]  # it costs nothing else
    engine.detach()


def test_the_default_teacher_is_the_model_before_training() -> None:
    model = vit(0)
    first = copy.deepcopy(model)
    engine, optimizer = attached(model, "{logits: 1}", None)
    assert train(engine, model, optimizer) == [pytest.approx(0, abs=1e-6)]
    ours, theirs = logits(model, first)
    assert train(engine, model, optimizer) == [pytest.approx(divergence(ours, theirs), rel=1e-3)]


class _Dropped(TokenHooks):
    """Stands in for a token modifier: patches 3 and 1 are left, the second of them masked in the last image."""

    def register(self, vit: Any) -> list[Any]:
        return [vit.blocks[1].register_forward_pre_hook(self._drop)]

    def patches_left(self) -> list[tuple[int, int]]:
        return [(1, 2)]

    def _drop(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        index = torch.tensor([3, 1]).expand(len(args[0]), -1)
        weight = torch.ones(len(args[0]), 2)
        weight[-1, 1] = 0
        self.survivors = Survivors(index, weight)
        x = args[0]
        return (torch.cat([x[:, :1], x[:, 1:][:, [3, 1]]], 1),)


def test_tokens_that_are_left_learn_from_their_own_places() -> None:
    model, teacher = vit(0), vit(1)
    engine = engine_for(model, "{logits: 0, tokens: 1}", teacher).prepare()
    _Dropped(find_layout(model)).install(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    with torch.no_grad():
        ours, theirs = model.forward_features(IMAGES)[:, 1:], teacher.forward_features(IMAGES)[:, 1:]
    squares = [
        (ours[b, m] - theirs[b, place]).square() for b in range(8) for m, place in enumerate([3, 1]) if (b, m) != (7, 1)
    ]
    assert train(engine, model, optimizer) == [pytest.approx(float(torch.stack(squares).mean()), rel=1e-4)]


def test_parts_of_the_model_called_by_the_loop_are_told() -> None:
    model = vit(0)
    engine, optimizer = attached(model, "{}", vit(1))
    logits = model.forward_head(model.forward_features(IMAGES))
    engine.loss(nn.functional.cross_entropy(logits, LABELS)).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="distill: a step was made, and no forward pass of the model was seen: the"):
        optimizer.step()


def test_what_teachers_can_not_teach() -> None:
    cases = [
        ("{}", vit(1, num_classes=3), r"distill: the teacher gives logits of shape \[8, 3\], the model \[8, 4\]"),
        ("{logits: 0, tokens: 1}", vit(1, embed_dim=4), "has 4 patch tokens of 4 numbers, the model 4 of 8: give a"),
        ("{logits: 0, tokens: 1}", vit(1, patch_size=2), "has 16 patch tokens of 8 numbers, the model 4 of 8: give a"),
        ("{}", nn.Sequential(nn.Flatten(), nn.LSTM(64, 4)), "no logits in a model's output of type tuple"),
    ]
    for options, teacher, message in cases:
        model = vit(0)
        engine, optimizer = attached(model, options, teacher)
        with pytest.raises(RecipeError, match=message):
            train(engine, model, optimizer)


def test_options_that_make_no_sense() -> None:
    for options, message in [
        ("{logits: 0}", "r.yaml:2:14: distill: 'logits' and 'tokens' are both 0: nothing would be learned"),
        ("{hard: true, temperature: 2}", "'temperature' 2 softens probabilities, and 'hard' uses none"),
        (
            "{logits: 0, tokens: 1, hard: true}",
            "distill: 'hard' is of the logits' term, and 'logits' is 0: leave it out",
        ),
        ("{logits: 0, tokens: 1, temperature: 2}", "distill: 'temperature' is of the logits' term, and 'logits' is 0"),
        ("{temperature: 0}", "distill.temperature: input should be greater than 0: 0"),
        ("{logits: -1}", "distill.logits: input should be greater than or equal to 0: -1"),
        ("{start: 3st, end: 3st}", "distill.end: '3st' does not come after the start at '3st'"),
        ("{start: 6st}", "distill.start: no step lies between the start at '6st' and the end of training"),
        ("{end: 7st}", "distill.end: '7st' is step 7, past the end of training at step 6"),
    ]:
        with pytest.raises(RecipeError, match=message):
            engine_for(vit(0), options)
    with pytest.raises(
        RecipeError, match=r"r.yaml:2:23: distill.tokens: the model \(Sequential\) has no final norm 'no"
    ):
        engine_for(nn.Sequential(nn.Linear(2, 2)), "{tokens: 1}").prepare()


@pytest.mark.parametrize("pooled", ["the model", "the teacher"])
def test_tokens_that_no_norm_sees_are_refused(pooled: str) -> None:
    """With global_pool avg timm's `norm` is nothing, and `fc_norm` sees the mean: such tokens differ in scale."""
    model = vit(0, global_pool="avg", class_token=False) if pooled == "the model" else vit(0)
    teacher = vit(1) if pooled == "the model" else vit(1, global_pool="avg", class_token=False)
    with pytest.raises(
        RecipeError, match=rf"r.yaml:2:23: distill.tokens: {pooled} \(VisionTransformer\) norms the mean of its tokens"
    ):
        engine_for(model, "{tokens: 1}", teacher).prepare()
    engine_for(model, "{logits: 1}", teacher).prepare()


def test_training_that_ends_before_the_start_is_told() -> None:
    model = vit(0)
    engine, optimizer = attached(model, "{start: 3st}", vit(1))
    train(engine, model, optimizer)
    train(engine, model, optimizer)
    with pytest.raises(
        RuntimeError, match="distill: training ended before the teacher's term at step 3: the optimizer"
    ):
        engine.detach()
    model = vit(0)
    engine, optimizer = attached(model, "{start: 5st}", vit(1))
    for _ in range(5):  # of six: no step with the term was made
        train(engine, model, optimizer)
    with pytest.raises(RecipeError, match=r"distill.start: training ended before a step with the teacher's term was"):
        engine.detach()  # and no warning says that something was done


def test_the_timeline_tells_the_terms() -> None:
    (modifier,) = recipe("distill: {logits: 0.5, tokens: 0.25, temperature: 2, start: 1st, end: 4st}").modifiers
    assert isinstance(modifier, Distill)
    engine = engine_for(vit(0), "{}")
    assert list(modifier.timeline(engine.run.clock)) == [
        (1, "loss", "0.5 x teacher's logits at temperature 2 + 0.25 x teacher's tokens"),
        (4, "loss", "no more of the teacher's"),
    ]


def test_the_term_is_in_the_history_once_an_epoch() -> None:
    model = vit()
    engine = Engine(model, recipe("distill: {end: 4st}"), steps_per_epoch=2, epochs=3, teacher=vit(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    terms = train(engine, model, optimizer, 6)
    assert [(step, name) for step, name, _ in engine.run.history] == [(2, "distill/loss"), (4, "distill/loss")]
    told = [value for _, _, value in engine.run.history]
    assert told == pytest.approx([terms[1], terms[3]], rel=0.01)  # those are differences of two losses


def test_after_training_the_loss_is_as_it_is() -> None:
    model = vit()
    engine = Engine(model, recipe("distill: {}"), steps_per_epoch=60, epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    for _ in range(59):
        optimizer.zero_grad()
        engine.loss(nn.functional.cross_entropy(model(IMAGES[:2]), LABELS[:2])).backward()
        optimizer.step()
    engine.detach()
    loss = nn.functional.cross_entropy(model(IMAGES), LABELS)
    assert engine.loss(loss) is loss


def test_every_step_must_have_its_term() -> None:
    """Not the first alone: a loop may lose the line, or its forward, later on."""
    model = vit()
    engine, optimizer = attached(model, "{}", None)
    train(engine, model, optimizer, 2)
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="the loss had no term of distill"):
        optimizer.step()


def test_every_step_must_have_its_forward() -> None:
    model = vit()
    engine, optimizer = attached(model, "{}", None)
    train(engine, model, optimizer, 2)
    output = model.forward_head(model.forward_features(IMAGES))  # parts of the model, which no hook sees
    engine.loss(nn.functional.cross_entropy(output, LABELS)).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="distill: a step was made, and no forward pass of the model was seen"):
        optimizer.step()


@pytest.mark.parametrize(("times", "without"), [("{end: 2st}", range(2, 6)), ("{start: 4st}", range(4))])
def test_a_loop_may_leave_the_term_out_where_there_is_none(times: str, without: range) -> None:
    model = vit()
    engine, optimizer = attached(model, times, None)
    for step in range(6):
        if step in without:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(IMAGES), LABELS).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        else:
            train(engine, model, optimizer)
    engine.detach()
    assert engine.finished


@pytest.mark.parametrize(("times", "first"), [("{end: 2st}", 1), ("{start: 4st}", 4)])
def test_the_term_must_be_there_at_the_ends_of_its_time(times: str, first: int) -> None:
    model = vit()
    engine, optimizer = attached(model, times, None)
    train(engine, model, optimizer, first)
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="the loss had no term of distill"):
        optimizer.step()


def test_the_forward_of_a_skipped_step_is_not_that_of_the_next() -> None:
    model = vit()
    engine, optimizer = attached(model, "{}", None)
    engine.loss(nn.functional.cross_entropy(model(IMAGES), LABELS))
    engine.skip_step()
    with torch.no_grad():
        output = model(IMAGES)  # without gradients: no lesson
    engine.loss(nn.functional.cross_entropy(output + model.head.bias, LABELS)).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="distill: a step was made, and no forward pass of the model was seen"):
        optimizer.step()
