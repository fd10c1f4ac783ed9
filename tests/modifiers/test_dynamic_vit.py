"""DynamicViT: counts, the masked form against the real one, gradients, learning rates."""

import copy
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ovit_engine import Calibration, Engine, RecipeError
from ovit_engine.flops import count_flops
from ovit_engine.modifiers.dynamic_vit import DynamicViT
from ovit_engine.targets import parameter_slots
from ovit_engine.tokens import hooks_of, param_groups
from ovit_engine.tokens.samplers import KeepOrDrop, Sampler, TopTokens, gumbel, ratio_loss
from ovit_engine.tokens.scorers import LinearScorer, Predictor, make_scorer
from ovit_engine.tokens.selector import SelectorHooks
from tests.loops import recipe
from tests.tokens.models import IMAGES, KINDS, logits, randomised, vit

LABELS = torch.arange(len(IMAGES)) % 5
PLAIN = "dynamic_vit: {keep: 0.7}"


class Best(Sampler):
    """What inference does: the best tokens, no noise, and no gradient of having chosen them."""

    choices = 1

    def __call__(self, scores: Tensor, noise: Tensor, keep: int, before: Tensor | None) -> Tensor:
        return TopTokens(1.0)(scores, torch.zeros_like(noise), keep, before).detach()


def prepared(options: str = PLAIN, *, steps: int = 4, **model: Any) -> tuple[Any, Engine, SelectorHooks]:
    """A model under a recipe, its predictors drawn anew so that scores differ."""
    built = vit(**model)
    engine = Engine(built, recipe(options), steps_per_epoch=steps, epochs=1).prepare()
    randomised(built, seed=1)
    hooks = hooks_of(built)
    assert isinstance(hooks, SelectorHooks)
    return built, engine, hooks


def train(engine: Engine, optimizer: torch.optim.Optimizer, steps: int) -> None:
    engine.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        engine.loss(cross_entropy(engine.model(IMAGES), LABELS)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def predictors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "token_predictor" in name}


# --- counts


def at_224(options: str, name: str = "small") -> tuple[nn.Module, list[int]]:
    width, heads = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}[name]
    with torch.device("meta"):
        model = VisionTransformer(embed_dim=width, num_heads=heads)
    engine = Engine(model, recipe(options), steps_per_epoch=10, epochs=1).prepare()
    modifier = engine.modifiers[0]
    assert isinstance(modifier, DynamicViT)
    return model, [stage.keep for stage in modifier.selector.stages]


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ("{prune: 0.2}", [156, 125, 100]),
        ("{keep: 0.8}", [156, 125, 100]),
        ("{keep_tokens: [156, 125, 100], blocks: [3, 6, 9]}", [156, 125, 100]),
        ("{keep: 0.7}", [137, 96, 67]),
    ],
)
def test_keep_and_prune_mean_what_they_say(options: str, counts: list[int]) -> None:
    assert at_224(f"dynamic_vit: {options}", "tiny")[1] == counts


TABLE = {  # GMACs with predictors: specs/structured-and-tokens.md §7.4; README of DynamicViT: 2.9, 3.4, 4.0 and 11.4
    "tiny": {0.9: 1.091, 0.8: 0.932, 0.7: 0.801, 0.6: 0.690, 0.5: 0.602},
    "small": {0.9: 4.041, 0.8: 3.463, 0.7: 2.981, 0.6: 2.565, 0.5: 2.229},
    "base": {0.9: 15.51, 0.8: 13.32, 0.7: 11.48, 0.6: 9.87, 0.5: 8.56},
}


@pytest.mark.parametrize(
    ("name", "keep"), [("tiny", 0.8), ("tiny", 0.5), ("small", 0.7), ("small", 0.9), ("base", 0.7)]
)
def test_operations_are_those_of_the_table(name: str, keep: float) -> None:
    model, _ = at_224(f"dynamic_vit: {{keep: {keep}}}", name)
    counted = count_flops(model, torch.zeros(1, 3, 224, 224, device="meta")).dense / 2e9
    assert counted == pytest.approx(TABLE[name][keep], rel=0.01)
    assert counted == pytest.approx(TABLE[name][keep], rel=0.001)  # what we count is the spec's own arithmetic


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{}", "say once how many tokens stay, by 'keep', 'prune' or 'keep_tokens': none is given"),
        ("{keep: 0.8, prune: 0.2}", "not keep and prune"),
        ("{keep: 0.1}", r"r.yaml:2:25: dynamic_vit.keep: 16 patch tokens would become \[1, 0, 0\]"),
        ("{keep_tokens: [9, 4]}", r"dynamic_vit.keep_tokens: \[9, 4\] has 2 counts for 3 stages"),
        ("{keep_tokens: [9, 10, 4]}", "10 tokens can't be kept of 9"),
        ("{keep_tokens: [17, 10, 4]}", "17 tokens can't be kept of 16"),
        ("{keep: 0.5, blocks: [3, 1]}", r"dynamic_vit.blocks: \[3, 1\] must rise"),
        ("{keep: 0.5, blocks: [4]}", r"dynamic_vit.blocks: \[4\]: the model has blocks 0 to 3"),
        ("{keep: 0.5, freeze: 9ep}", "dynamic_vit.freeze: '9ep' is step 36, past the end"),
    ],
)
def test_wrong_options_are_refused(options: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        prepared(f"dynamic_vit: {options}")


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:2:5: dynamic_vit: Linear has no vision transformer"):
        Engine(nn.Linear(2, 2), recipe(PLAIN), steps_per_epoch=1, epochs=1).prepare()
    two = Engine(vit(), recipe(PLAIN, "svite_tokens: {keep: 0.9}"), steps_per_epoch=1, epochs=1)
    with pytest.raises(RecipeError, match="svite_tokens: the model's tokens are reduced already"):
        two.prepare()


# --- training form and deployed form


@pytest.mark.parametrize("kind", KINDS)
def test_masking_and_gathering_agree(kind: str) -> None:
    model, _, hooks = prepared(**KINDS[kind])
    hooks.sampler = Best()
    with torch.no_grad():
        masked = model.train()(IMAGES)
    kept = [int(decided.sum()) for decided in hooks._decisions.values()]
    assert kept == [11 * 6, 7 * 6, 5 * 6]
    gathered = logits(model)
    assert torch.allclose(masked, gathered, atol=1e-5)
    assert not torch.allclose(gathered, logits(vit(seed=1, **KINDS[kind])), atol=1e-2)  # dropping does something


def test_masking_and_gathering_agree_in_blocks_between_stages() -> None:
    model, _, hooks = prepared("dynamic_vit: {keep: 0.5, blocks: [0, 2]}", depth=5)
    hooks.sampler = Best()
    with torch.no_grad():
        masked = model.train()(IMAGES)
    assert torch.allclose(masked, logits(model), atol=1e-5)


def test_gradients_of_masking_and_gathering_agree() -> None:
    """So calibration, which runs in eval mode, sees the gradients of deterministic masking without noise."""
    model, _, hooks = prepared()
    slots = [slot for slot in parameter_slots(model) if slot.name.endswith(("qkv.weight", "fc1.weight"))]
    data = torch.utils.data.TensorDataset(IMAGES, LABELS)
    draws = []
    for _ in range(2):
        model.train()
        chunks = Calibration(data, cross_entropy).gradients(model, slots, count=1, images_per_gradient=6, chunk=1)
        (found,) = ([part.clone() for part in chunk] for chunk in chunks)
        assert model.training
        assert hooks.take_decisions() is None  # no loss term is left behind by it
        draws.append(found)
    hooks.sampler = Best()
    loss = cross_entropy(model(IMAGES), LABELS)
    for first, second, masked in zip(*draws, torch.autograd.grad(loss, [s.tensor for s in slots]), strict=True):
        assert torch.equal(first, second)
        assert torch.allclose(first[0], masked, atol=1e-5)
        assert masked.abs().max() > 1e-3


def test_nothing_is_kept_of_what_is_dropped_in_training() -> None:
    """Garbage in dropped tokens changes no logit by more than the bias leaves of it."""
    model, _, hooks = prepared("dynamic_vit: {keep: 0.5, blocks: [1]}")
    hooks.sampler = Best()

    def spoil(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        dropped = 1 - torch.cat([torch.ones(6, 1), hooks._decisions[0]], 1)
        return output + 3 * dropped.unsqueeze(-1)

    model.train()
    with torch.no_grad():
        before = model(IMAGES)
        model.blocks[1].register_forward_hook(spoil)
        assert torch.allclose(model(IMAGES), before, atol=1e-4)


def test_all_tokens_kept_is_the_dense_model() -> None:
    model, _, _ = prepared("dynamic_vit: {keep: 1.0}")
    dense = vit()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "token_predictor" not in k})
    assert torch.equal(logits(model), logits(dense))


def test_inference_is_the_same_every_time_and_for_any_batch() -> None:
    model, _, _ = prepared()
    whole = logits(model)
    assert torch.equal(whole, logits(model))
    singles = torch.cat([logits(model, IMAGES[i : i + 1]) for i in range(6)])
    assert torch.allclose(whole, singles, atol=1e-5)


def test_the_order_of_patches_does_not_matter_behind_the_position_embedding() -> None:
    model, _, _ = prepared()
    before = logits(model)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    model.blocks[0].register_forward_pre_hook(
        lambda block, args: torch.cat([args[0][:, :1], args[0][:, 1:][:, order]], 1)
    )
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_a_copy_uses_its_own_predictors() -> None:
    model, _, hooks = prepared()
    for other in (copy.deepcopy(model), ModelEmaV3(model).module):
        before = logits(model)
        assert torch.equal(logits(other), before)
        for parameter in predictors(other).values():
            parameter.data.neg_()
        assert not torch.allclose(logits(other), before, atol=1e-3)
        assert torch.equal(logits(model), before)
        assert hooks_of(other) is not hooks
    model.train()(IMAGES)  # what a forward pass with a history left behind does not stand in the way of a copy
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_other_image_sizes_and_masks_are_refused() -> None:
    model, _, _ = prepared()
    x = torch.zeros(1, 10, 24)
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"10 tokens came where 1 \+ 16 were expected"):
            model.train(mode).blocks[1](x)
    with pytest.raises(ValueError, match="an attn_mask of its own"):
        model.train()(IMAGES, attn_mask=torch.ones(17, 17, dtype=torch.bool))


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


def test_what_training_keeps_is_in_the_history() -> None:
    """Far from what inference keeps, it tells of predictors that have saturated."""
    model, engine, hooks = prepared()
    hooks.sampler = Best()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    engine.attach(optimizer)
    train(engine, optimizer, 4)
    names = [f"dynamic_vit/kept_{stage}" for stage in (1, 2, 3)]
    assert engine.run.history == [(4, name, count / 16) for name, count in zip(names, (11, 7, 5), strict=True)]


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


# --- gradient checkpointing


def gradients(checkpointing: bool) -> tuple[float, list[Tensor]]:
    model, engine, _ = prepared()
    model.set_grad_checkpointing(checkpointing)
    model.train()
    loss = engine.loss(cross_entropy(model(IMAGES), LABELS))
    loss.backward()  # type: ignore[no-untyped-call]
    again = float(engine.loss(torch.zeros(())))
    assert again == 0
    return float(loss.detach()), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_checkpointing_changes_nothing() -> None:
    (loss, plain), (checkpointed_loss, checkpointed) = gradients(False), gradients(True)
    assert loss == checkpointed_loss
    assert len(plain) == len(checkpointed)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, checkpointed, strict=True))


def test_reentrant_checkpointing_is_refused() -> None:
    model, _, _ = prepared()
    model.train()
    x = torch.zeros(2, 17, 24, requires_grad=True)
    model.blocks[0](x)
    output = torch.utils.checkpoint.checkpoint(model.blocks[1], x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        output.sum().backward()


def test_two_passes_before_backward_are_refused_under_checkpointing() -> None:
    model, _, _ = prepared()
    model.set_grad_checkpointing(True)
    model.train()
    loss = cross_entropy(model(IMAGES), LABELS) + cross_entropy(model(IMAGES), LABELS)
    with pytest.raises(RuntimeError, match="needs backward after each forward pass"):
        loss.backward()  # type: ignore[no-untyped-call]


# --- learning rates

SLOW = "dynamic_vit: {keep: 0.7, backbone_lr_scale: 0.25, freeze: 2st}"


def test_the_backbone_is_frozen_and_then_slow() -> None:
    model, engine, _ = prepared(SLOW)
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    engine.attach(optimizer)
    seen: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([group["lr"] for group in optimizer.param_groups]))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(4):
        train(engine, optimizer, 1)
        assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()  # as it left them
        scheduler.step()
        for name, parameter in model.named_parameters():
            moved = not torch.equal(parameter, start[name])
            assert moved == (step >= 2 or "token_predictor" in name), (step, name)
            assert parameter.requires_grad
    factors = [[rate * (1 + step) / 1e-2 for rate in rates] for step, rates in enumerate(seen)]
    for found, backbone in zip(factors, (0, 0, 0.25, 0.25), strict=True):
        assert found == pytest.approx([backbone, backbone, 1, 1])
    engine.detach()


def test_it_comes_after_whoever_writes_learning_rates() -> None:
    model = vit()
    both = recipe(SLOW, "cyclic_lr: {max: 0.1, min: 0.01, period: 4st, warmup: 1st}")
    engine = Engine(model, both, steps_per_epoch=4, epochs=1).prepare()
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    engine.attach(optimizer)
    seen: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([group["lr"] for group in optimizer.param_groups]))
    train(engine, optimizer, 4)
    assert [rates[0] / rates[-1] for rates in seen] == pytest.approx([0, 0, 0.25, 0.25])
    assert [rates[-1] for rates in seen] == pytest.approx([0.1, 0.0775, 0.055, 0.0325])


def test_a_rate_that_is_a_tensor_is_scaled_in_place() -> None:
    model, engine, _ = prepared(SLOW)
    rate = torch.tensor(1e-2)
    optimizer = torch.optim.AdamW(param_groups(model), lr=rate, capturable=False, foreach=False)
    engine.attach(optimizer)
    before = [group["lr"] for group in optimizer.param_groups]
    train(engine, optimizer, 1)
    after = [group["lr"] for group in optimizer.param_groups]
    assert all(a is b and float(a) == pytest.approx(1e-2) for a, b in zip(before, after, strict=True))


def test_a_step_that_raised_leaves_no_rate_behind() -> None:
    model, engine, _ = prepared("dynamic_vit: {keep: 0.7, backbone_lr_scale: 0.25}")
    optimizer = torch.optim.SGD(param_groups(model), lr=1e-2)
    engine.attach(optimizer)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        train(engine, optimizer, 1)
    handle.remove()
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    train(engine, optimizer, 3)
    assert seen == [0.25e-2] * 3
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2] * 4


def test_groups_that_mix_predictors_with_the_rest_are_refused() -> None:
    model, engine, _ = prepared(SLOW)
    with pytest.raises(RecipeError, match=r"r.yaml:2:\d+: dynamic_vit.freeze: a parameter group .* param_groups"):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    model, engine, _ = prepared("dynamic_vit: {keep: 0.7, backbone_lr_scale: 0.5}")
    with pytest.raises(RecipeError, match=r"dynamic_vit.backbone_lr_scale: a parameter group"):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    model, engine, _ = prepared()
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))  # one rate for all needs no groups


def test_groups_hold_every_parameter_once_and_decay_matrices_only() -> None:
    model, _, _ = prepared()
    groups = param_groups(model, weight_decay=0.1)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        members = [names[id(parameter)] for parameter in group["params"]]
        assert len({"token_predictor" in name for name in members}) == 1
        for name in members:
            plain = name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed") or ".local.0." in name
            assert (group["weight_decay"] == 0.0) == plain, name


# --- what others leave alone


def test_pruners_and_quantizers_leave_predictors_alone() -> None:
    model = vit()
    all_of_them = recipe(
        PLAIN,
        "magnitude_prune: {sparsity: 0.5, targets: ['preset:vit']}",
        "quantize: {start: 1st, groups: [linear, conv, layer_norm]}",
    )
    engine = Engine(model, all_of_them, steps_per_epoch=4, epochs=1).prepare()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    engine.attach(optimizer)
    assert engine.run.masks.names()
    assert not [name for name in engine.run.masks.names() if "token_predictor" in name]
    kinds = {type(module).__name__ for name, module in model.named_modules() if "token_predictor" in name}
    assert kinds == {"Predictor", "Sequential", "Linear", "LayerNorm", "GELU"}
    assert not [n for n, m in model.named_modules() if "token_predictor" in n and m._forward_hooks]
    assert type(model.blocks[0].attn.qkv).__name__ == "QuantLinear"


def test_expressions_pass_predictors_over_and_names_do_not() -> None:
    from ovit_engine.targets import find_slots

    model, _, _ = prepared()
    found = [slot.name for slot in find_slots(model, [r"re:blocks\.1\..*(fc1|logits|local\.1)\.weight"])]
    assert found == ["blocks.1.mlp.fc1.weight"]
    named = "blocks.1.token_predictor.logits.weight"
    assert [slot.name for slot in find_slots(model, [named])] == [named]
    with pytest.raises(ValueError, match="matches no parameter"):
        find_slots(model, ["re:.*token_predictor.*weight"])
    calibration = Calibration(torch.utils.data.TensorDataset(IMAGES, LABELS), cross_entropy)
    with pytest.raises(ValueError, match=f"does not depend on '{named}': leave it out"):
        list(calibration.gradients(model, find_slots(model, [named]), count=1, images_per_gradient=2, chunk=1))


def test_quantize_takes_a_predictor_that_is_named() -> None:
    named = "blocks.1.token_predictor.logits"
    both = recipe(PLAIN, f"quantize: {{targets: ['{named}', 're:blocks.*']}}")
    model = vit()
    Engine(model, both, steps_per_epoch=4, epochs=1).prepare()
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if "token_predictor" in name}
    assert [name for name, kind in kinds.items() if kind == "QuantLinear"] == [named]
    excluded = recipe(PLAIN, "quantize: {exclude: ['re:.*token_predictor.*']}")
    Engine(vit(), excluded, steps_per_epoch=4, epochs=1).prepare()  # to be careful is no error


# --- compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_training_is_the_same_and_inference_is_one_graph() -> None:
    losses = []
    for compiled in (False, True):
        model, engine, _ = prepared("dynamic_vit: {keep: 0.7, blocks: [0]}", depth=1)
        network = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        engine.attach(optimizer)
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            loss = engine.loss(cross_entropy(network(IMAGES), LABELS))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[:3] == losses[3:]
    model.eval()
    with torch.no_grad():
        whole = torch.compile(model, backend="eager", fullgraph=True)(IMAGES)
    assert torch.allclose(whole, logits(model), atol=1e-6)


def test_an_exception_in_a_frozen_step_leaves_the_rates_as_they_were() -> None:
    model, engine, _ = prepared(SLOW)
    optimizer = torch.optim.SGD(param_groups(model), lr=1e-2)
    engine.attach(optimizer)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), engine:
        train(engine, optimizer, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2] * 4
