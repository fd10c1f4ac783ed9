"""Which tokens stay in training: decisions, their noise and gradients, the term of the loss."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ovit_engine import Engine
from ovit_engine.tokens.samplers import KeepOrDrop, Sampler, gumbel, ratio_loss
from ovit_engine.tokens.scorers import LinearScorer, Predictor, make_scorer
from tests.loops import recipe
from tests.tokens.models import IMAGES, logits, vit
from tests.tokens.selecting import predictors, prepared
from tests.tokens.training import LABELS, train

# --- decisions


def test_decisions_only_ever_drop() -> None:
    model, _, hooks = prepared()
    model.train()(IMAGES)
    first, second, third = (decided.detach() for decided in hooks._decisions.values())
    assert {float(value) for value in torch.cat([first, second, third]).flatten()} == {0.0, 1.0}
    assert ((second <= first) & (third <= second)).all()
    assert not torch.equal(first, second)
    assert hooks.survivors is not None
    assert torch.equal(hooks.survivors.weight, third)
    assert torch.equal(hooks.survivors.origin, torch.arange(16).expand(6, -1))


def test_keep_or_drop_is_gumbel_softmax() -> None:
    """The published form, of two log-probabilities, in value and gradient."""
    pair = torch.randn(3, 7, 2, requires_grad=True)
    noise = gumbel((3, 7, 2), torch.device("cpu"), seed=1)
    upstream = torch.randn(3, 7)
    ours = KeepOrDrop()(pair[..., 0] - pair[..., 1], noise, 0, None)
    (ours_gradient,) = torch.autograd.grad((ours * upstream).sum(), pair)
    soft = (pair.log_softmax(-1) + noise).softmax(-1)
    theirs = soft[..., 0]
    (theirs_gradient,) = torch.autograd.grad((theirs * upstream).sum(), pair)
    assert torch.equal(ours, (soft.argmax(-1) == 0).float())
    assert torch.allclose(ours_gradient, theirs_gradient, atol=1e-6)


def test_noise_is_gumbel() -> None:
    noise = gumbel((200_000,), torch.device("cpu"), seed=3)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, rel=0.02)
    assert torch.equal(noise, gumbel((200_000,), torch.device("cpu"), seed=3))
    assert not torch.equal(noise, gumbel((200_000,), torch.device("cpu"), seed=4))


def test_noise_depends_on_seed_step_and_pass() -> None:
    def decisions(seed: int) -> list[Tensor]:
        model, engine, hooks = prepared(f"dynamic_vit: {{keep: 0.7, seed: {seed}}}")
        engine.attach(torch.optim.SGD(model.parameters(), 0.0))
        found, state = [], torch.get_rng_state()
        for _ in range(2):
            model.train()(IMAGES)
            found.append(hooks._decisions[0])
            train(engine, engine.run.optimizers[0], 1)
            model.train()(IMAGES)
            found.append(hooks._decisions[0])
        assert torch.equal(state, torch.get_rng_state())  # nothing is drawn from the user's random numbers
        return found

    first = decisions(0)
    assert all(torch.equal(a, b) for a, b in zip(first, decisions(0), strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    assert not torch.equal(first[0], decisions(1)[0])


def test_predictors_start_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = make_scorer(Predictor, torch.zeros(1), 24, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, third = (make_scorer(Predictor, torch.zeros(1), 24, seed=seed) for seed in (3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.logits.weight, third.logits.weight)  # type: ignore[union-attr]
    assert isinstance(make_scorer(LinearScorer, torch.zeros(1, dtype=torch.float64), 24, seed=3).linear.weight, Tensor)


def test_predictors_compute_in_their_own_type_under_autocast() -> None:
    scorer = make_scorer(Predictor, torch.zeros(1), 24, seed=0)
    x = torch.randn(2, 16, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer(x, None), scorer.score(x, None).float()) is False
        found = scorer(x, None)
    assert found.dtype == torch.float32
    assert torch.equal(found, scorer(x, None))
    assert torch.equal(scorer(x, None), scorer(x, torch.ones(2, 16)))


# --- the loss


def test_the_ratio_loss_is_zero_where_the_share_is_right() -> None:
    half = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    assert float(ratio_loss([half], [0.5])) == 0
    # (0.25^2 + 0) / 2 images, and 0: the mean over two stages
    quarter = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    assert float(ratio_loss([quarter, half], [0.5, 0.5])) == pytest.approx(0.25**2 / 2 / 2)


def test_the_ratio_loss_pulls_to_the_target() -> None:
    kept = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(ratio_loss([kept], [0.5]), kept)
    assert (gradient[0] > 0).all()
    assert (gradient[1] < 0).all()


def test_the_term_is_that_of_the_paper_and_comes_once() -> None:
    model, engine, hooks = prepared("dynamic_vit: {keep: 0.7, ratio_weight: 3.0}")
    model.train()(IMAGES)
    stages = [decided.detach() for decided in hooks._decisions.values()]
    counts = [11, 7, 5]
    expected = sum(
        (float(image.sum()) / 16 - count / 16) ** 2
        for stage, count in zip(stages, counts, strict=True)
        for image in stage
    )
    zero = torch.zeros(())
    with torch.no_grad():
        assert float(engine.loss(zero)) == 0  # a loss without gradients is of evaluation
    assert float(engine.loss(zero).detach()) == pytest.approx(3.0 * expected / 6 / 3, rel=1e-5)
    assert float(engine.loss(zero)) == 0  # a second loss of the same pass, an auxiliary one
    logits(model)
    assert float(engine.loss(zero)) == 0
    with torch.no_grad():
        model.train()(IMAGES)
    assert float(engine.loss(zero)) == 0


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_terms_are_right_under_accumulation_and_scaling(scale: float) -> None:
    """Each part of a batch brings its own term, by the criterion's hook, and is scaled with the loss."""
    model, engine, hooks = prepared("dynamic_vit: {keep: 0.7}")
    criterion = nn.CrossEntropyLoss()
    engine.attach(torch.optim.SGD(model.parameters(), 0.1), criterion=criterion)
    model.train()
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for part in range(2):
        output = model(IMAGES[3 * part : 3 * part + 3])
        decided = list(hooks._decisions.values())
        plain = cross_entropy(output, LABELS[3 * part : 3 * part + 3]) + 2.0 * ratio_loss(
            decided, [11 / 16, 7 / 16, 5 / 16]
        )
        grads = torch.autograd.grad(plain / 2, list(model.parameters()))
        for total, grad in zip(expected.values(), grads, strict=True):
            total += grad
    hooks.end_step(0)
    for part in range(2):
        loss = criterion(model(IMAGES[3 * part : 3 * part + 3]), LABELS[3 * part : 3 * part + 3])
        (loss / 2 * scale).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad / scale, expected[name], atol=1e-6), name


def test_the_loss_alone_reaches_every_predictor() -> None:
    model, _, _ = prepared()
    cross_entropy(model.train()(IMAGES), LABELS).backward()  # type: ignore[no-untyped-call]
    for name, parameter in predictors(model).items():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 1e-7, name


def test_an_image_that_loses_all_its_tokens_is_no_disaster() -> None:
    class DropsAllOfOne(Sampler):
        choices = 2

        def __call__(self, scores: Tensor, noise: Tensor, keep: int, before: Tensor | None) -> Tensor:
            decided = KeepOrDrop()(scores, noise, keep, before)
            return torch.cat([decided[:1] * 0, decided[1:]])

    model, engine, hooks = prepared()
    hooks.sampler = DropsAllOfOne()
    loss = engine.loss(cross_entropy(model.train()(IMAGES), LABELS))
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("training", [False, True])
def test_a_pass_between_a_forward_and_its_loss_changes_nothing(training: bool) -> None:
    """One of inference, or of training without gradients."""
    terms = []
    for between in (False, True):
        model, engine, _ = prepared()
        model.train()(IMAGES)
        if between:
            model.train(training)
            with torch.no_grad():
                model(IMAGES[:3])
            model.train()
        terms.append(float(engine.loss(torch.zeros(())).detach()))
    assert terms[0] == terms[1] > 0


def test_every_step_must_have_its_term() -> None:
    model, engine, _ = prepared()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    engine.attach(optimizer)
    train(engine, optimizer, 2)
    cross_entropy(model(IMAGES), LABELS).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="the loss had no term of dynamic_vit"):
        optimizer.step()


def test_a_step_whose_forward_decided_nothing_is_told() -> None:
    """As with a transformer that is frozen by eval() inside a model that trains."""
    outer = nn.Sequential(vit(), nn.Linear(5, 5))
    engine = Engine(outer, recipe("dynamic_vit: {keep: 0.7}"), steps_per_epoch=4, epochs=1).prepare()
    optimizer = torch.optim.SGD(outer.parameters(), 1e-3)
    engine.attach(optimizer)
    train(engine, optimizer, 2)
    outer[0].eval()
    engine.loss(cross_entropy(outer(IMAGES), LABELS)).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="dynamic_vit: a step was made, and no forward pass of the model was seen"):
        optimizer.step()


@pytest.mark.parametrize(
    ("mode", "match"), [("none", "the loss had no term of"), ("eval", "no forward pass of the model was seen")]
)
def test_the_term_of_a_skipped_step_is_not_that_of_the_next(mode: str, match: str) -> None:
    outer = nn.Sequential(vit(), nn.Linear(5, 5))
    engine = Engine(outer, recipe("dynamic_vit: {keep: 0.7}"), steps_per_epoch=4, epochs=1).prepare()
    optimizer = torch.optim.SGD(outer.parameters(), 1e-3, fused=True)
    engine.attach(optimizer)
    scaler: Any = torch.amp.GradScaler("cpu")
    scaler.scale(engine.loss(cross_entropy(outer(IMAGES), LABELS)) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert (engine.run.step, engine.run.skipped) == (0, 1)
    optimizer.zero_grad()
    outer[0].train(mode != "eval")
    loss = cross_entropy(outer(IMAGES), LABELS)
    scaler.scale(engine.loss(loss) if mode == "eval" else loss).backward()
    with pytest.raises(RuntimeError, match=match):
        scaler.step(optimizer)


def test_nothing_is_added_once_training_is_over() -> None:
    model, engine, _ = prepared()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    engine.attach(optimizer)
    train(engine, optimizer, 4)
    engine.detach()
    loss = cross_entropy(model.train()(IMAGES), LABELS)
    assert engine.loss(loss) is loss
