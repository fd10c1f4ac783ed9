"""DynamicViT: counts, the masked form against the real one, what others leave alone."""

import copy

import pytest
import torch
from timm.models import VisionTransformer
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ovit_engine import Calibration, Engine, RecipeError
from ovit_engine.flops import count_flops
from ovit_engine.masking.parameters import parameter_slots
from ovit_engine.masking.targets import find_slots
from ovit_engine.modifiers.dynamic_vit import DynamicViT
from ovit_engine.tokens import hooks_of
from tests.loops import recipe
from tests.tokens.models import IMAGES, KINDS, logits, vit
from tests.tokens.selecting import PLAIN, Best, predictors, prepared
from tests.tokens.training import LABELS, train

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
        ("{keep: 70}", r"r.yaml:2:25: dynamic_vit.keep: 70 is no share of the tokens: did you mean 0.7\?"),
        ("{prune: 30%}", r"r.yaml:2:26: dynamic_vit.prune: 30% is no share of the tokens: did you mean 0.3\?"),
        ("{keep: 1.5}", "dynamic_vit.keep: input should be less than or equal to 1: 1.5"),
        ("{keep: most}", "dynamic_vit.keep: input should be a valid number"),
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


def test_a_state_is_loaded_as_the_docs_say() -> None:
    model, _, _ = prepared()
    plain = vit(seed=2)
    with pytest.raises(RuntimeError, match="token_predictor"):
        plain.load_state_dict(model.state_dict())
    text = recipe("dynamic_vit: {keep: 0.7, freeze: 5ep}")
    Engine(plain, text, steps_per_epoch=1, total_steps=1000).prepare()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(plain), logits(model))


def test_other_image_sizes_and_masks_are_refused() -> None:
    model, _, _ = prepared()
    x = torch.zeros(1, 10, 24)
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"10 tokens came where 1 \+ 16 were expected"):
            model.train(mode).blocks[1](x)
    with pytest.raises(ValueError, match="an attn_mask of its own"):
        model.train()(IMAGES, attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_what_training_keeps_is_in_the_history() -> None:
    """Far from what inference keeps, it tells of predictors that have saturated."""
    model, engine, hooks = prepared()
    hooks.sampler = Best()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    engine.attach(optimizer)
    train(engine, optimizer, 4)
    names = [f"dynamic_vit/kept_{stage}" for stage in (1, 2, 3)]
    assert engine.run.history == [(4, name, count / 16) for name, count in zip(names, (11, 7, 5), strict=True)]


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
