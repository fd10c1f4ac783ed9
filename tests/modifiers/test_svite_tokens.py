"""SViTE+'s selection of tokens before the first block."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ovit_engine import Engine, RecipeError
from ovit_engine.modifiers.svite_tokens import temperature
from ovit_engine.tokens import hooks_of
from ovit_engine.tokens.samplers import TopTokens, gumbel
from ovit_engine.tokens.selector import SelectorHooks
from tests.loops import recipe
from tests.tokens.models import IMAGES, KINDS, logits, randomised, vit

LABELS = torch.arange(len(IMAGES)) % 5


class Quiet(TopTokens):
    """Without noise."""

    def __call__(self, scores: Tensor, noise: Tensor, keep: int, before: Tensor | None) -> Tensor:
        return super().__call__(scores, torch.zeros_like(noise), keep, before)


def prepared(options: str = "keep: 0.6", *, quiet: bool = False, **model: Any) -> tuple[Any, Engine, SelectorHooks]:
    built = vit(**model)
    engine = Engine(built, recipe(f"svite_tokens: {{{options}}}"), steps_per_epoch=4, epochs=1).prepare()
    randomised(built, seed=1)
    hooks = hooks_of(built)
    assert isinstance(hooks, SelectorHooks)
    if quiet:
        hooks.sampler = Quiet(1.0)
    return built, engine, hooks


@pytest.mark.parametrize("kind", ["plain", "distilled", "registers"])
def test_exactly_so_many_stay_and_prefix_tokens_always(kind: str) -> None:
    model, _, hooks = prepared("keep_tokens: [9]", **KINDS[kind])
    seen = []
    handle = model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model.train()(IMAGES)
    assert hooks._decisions[0].detach().sum(1).tolist() == [9.0] * 6
    assert seen == [hooks.layout.prefix + 16]
    assert torch.allclose(hooks._biases[0][:, 0, -1, : hooks.layout.prefix].detach(), torch.zeros(()), atol=1e-5)
    logits(model)
    assert seen[1] == hooks.layout.prefix + 9
    handle.remove()


def test_decisions_are_zero_or_one_with_the_gradient_of_the_soft_ones() -> None:
    scores = torch.randn(4, 16, requires_grad=True)
    noise, upstream = gumbel((4, 16, 1), scores.device, seed=0), torch.randn(4, 16)
    decided = TopTokens(0.7)(scores, noise, 5, None)
    (ours,) = torch.autograd.grad((decided * upstream).sum(), scores)
    soft = ((scores.log_softmax(1) + noise[..., 0]) / 0.7).softmax(1)
    (theirs,) = torch.autograd.grad((soft * upstream).sum(), scores)
    assert set(decided.detach().unique().tolist()) == {0.0, 1.0}
    best = (scores + noise[..., 0]).argsort(1, descending=True)[:, :5]
    assert torch.equal(decided.detach(), torch.zeros(4, 16).scatter(1, best, 1.0))
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_a_second_stage_keeps_of_what_the_first_left() -> None:
    before = torch.zeros(2, 16)
    before[:, 4:12] = 1.0
    scores = torch.randn(2, 16)
    decided = TopTokens(1.0)(scores, torch.zeros(2, 16, 1), 3, before)
    assert decided.sum(1).tolist() == [3.0, 3.0]
    assert (decided <= before).all()
    assert torch.equal((decided[0] > 0).nonzero()[:, 0], (scores[0, 4:12].topk(3).indices + 4).sort().values)


@pytest.mark.parametrize("kind", KINDS)
def test_masking_and_gathering_agree(kind: str) -> None:
    model, _, _ = prepared(quiet=True, **KINDS[kind])
    with torch.no_grad():
        masked = model.train()(IMAGES)
    assert torch.allclose(masked, logits(model), atol=1e-5)


def test_zeroed_tokens_still_act_as_keys() -> None:
    """The published training form is another function than dropping tokens: this is why it is not the default."""
    model, _, _ = prepared("keep: 0.6, masking: zero", quiet=True)
    with torch.no_grad():
        masked = model.train()(IMAGES)
    assert not torch.allclose(masked, logits(model), atol=1e-2)


def test_inference_has_no_noise_and_takes_the_best_scores() -> None:
    model, _, hooks = prepared()
    assert torch.equal(logits(model), logits(model))
    with torch.no_grad():
        before = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(IMAGES))))
        after = hooks.gather(0, model.blocks[0], before)
        scores = model.blocks[0].token_predictor.linear(before[:, 1:])[..., 0]
    best = scores.argsort(1, descending=True)[:, :9]
    expected = torch.stack([before[i, 1:][best[i]] for i in range(6)])
    assert torch.equal(after[:, :1], before[:, :1])
    assert torch.equal(after[:, 1:], expected)


def test_the_temperature_falls_in_a_line() -> None:
    assert temperature(0.0) == 10.0
    assert temperature(1.0) == pytest.approx(0.1)
    assert temperature(0.5) == pytest.approx(5.05)
    values = [temperature(step / 50) for step in range(51)]
    assert values == sorted(values, reverse=True)
    model, engine, hooks = prepared()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    engine.attach(optimizer)
    assert isinstance(hooks.sampler, TopTokens)
    seen = [float(hooks.sampler.temperature)]
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(model.train()(IMAGES), LABELS).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen.append(float(hooks.sampler.temperature))
    assert seen == pytest.approx([10.0, 7.525, 5.05, 2.575, 0.1])


def test_the_loss_alone_reaches_the_scorer() -> None:
    model, engine, _ = prepared()
    loss = cross_entropy(model.train()(IMAGES), LABELS)
    assert engine.loss(loss) is loss  # the count is exact, so there is no term
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(model.blocks[0].token_predictor.linear.weight.grad.abs().max()) > 1e-6


def test_all_tokens_kept_is_the_dense_model() -> None:
    model, _, _ = prepared("keep_tokens: [16]")
    dense = vit()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "token_predictor" not in k})
    assert torch.equal(logits(model), logits(dense))
    model.train()
    with torch.no_grad():
        assert torch.allclose(model(IMAGES), logits(dense), atol=1e-5)


def test_pruners_and_quantizers_leave_the_scorer_alone() -> None:
    model = vit()
    lines = ("svite_tokens: {prune: 0.4}", "magnitude_prune: {sparsity: 0.5, targets: ['preset:vit']}", "quantize: {}")
    engine = Engine(model, recipe(*lines), steps_per_epoch=4, epochs=1)
    engine.attach(torch.optim.SGD(engine.prepare().model.parameters(), 0.1))
    assert type(model.blocks[0].token_predictor.linear) is nn.Linear
    assert "blocks.0.token_predictor.linear.weight" not in engine.run.masks.names()


def test_more_than_one_count_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"svite_tokens.keep_tokens: \[9, 4\] has 2 counts for 1 stage"):
        prepared("keep_tokens: [9, 4]")
