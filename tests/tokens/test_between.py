"""What reduces tokens inside blocks (evit, tome): the blocks that it takes, copies, stacks, precision."""

import copy
import pickle
from typing import Any

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from ovit_engine import Calibration, Engine, RecipeError
from ovit_engine.masking.parameters import parameter_slots
from ovit_engine.structured.gates import find_sites, install, set_gate
from ovit_engine.structured.shrink_model import shrink
from tests.loops import recipe
from tests.tokens.models import IMAGES, logits, vit
from tests.tokens.training import LABELS, attached, prepared, train, trained, widths

LINES = ["evit: {keep: 0.5, start: 1st, end: 6st}", "tome: {r: 3}"]


@pytest.mark.parametrize("line", LINES)
def test_inference_is_the_same_every_time_and_for_any_batch(line: str) -> None:
    model, _, hooks = prepared(line)
    whole = logits(model)
    assert torch.equal(whole, logits(model))
    singles = torch.cat([logits(model, IMAGES[i : i + 1]) for i in range(6)])
    assert torch.allclose(whole, singles, atol=1e-5)
    assert hooks.survivors is None  # nothing of it is left
    assert not any(getattr(hooks, name, None) for name in ("_sizes", "_kept"))


@pytest.mark.parametrize("line", LINES)
def test_a_resumed_run_is_the_same(line: str) -> None:
    """At every step, with a schedule under way; weights are equal to the last bit."""
    whole = trained(line, steps=8, depth=3)
    for cut in (1, 3, 5):
        again = trained(line, steps=8, cut=cut, depth=3)
        assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.parametrize("line", LINES)
def test_gradients_for_pruners_are_those_of_inference(line: str) -> None:
    model, _, hooks = prepared(line)
    slots = [slot for slot in parameter_slots(model) if slot.name.endswith(("qkv.weight", "fc1.weight"))]
    data = torch.utils.data.TensorDataset(IMAGES, LABELS)
    model.train()
    (found,) = Calibration(data, cross_entropy).gradients(model, slots, count=1, images_per_gradient=6, chunk=1)
    assert model.training
    assert hooks.survivors is None
    expected = torch.autograd.grad(cross_entropy(model.eval()(IMAGES), LABELS), [slot.tensor for slot in slots])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours[0], theirs, atol=1e-5)


# --- copies


def fresh(line: str, weights: dict[str, Tensor]) -> nn.Module:
    """A new model under the recipe, with these weights."""
    model, _, _ = prepared(line)
    model.load_state_dict(weights)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(("line", "counts"), [("evit: {keep: 0.6}", [3, 2, 1]), ("tome: {r: 3}", [0, 5, 0, 0])])
def test_a_copy_reduces_by_its_own_weights_and_counts(line: str, counts: list[int]) -> None:
    model, engine, hooks = prepared(line)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    before = logits(model)
    others = vit(seed=4).state_dict()
    for other in (copy.deepcopy(model), ModelEmaV3(model).module, pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), before)
        theirs = other._token_hooks
        assert theirs is not hooks
        other.load_state_dict(others)
        assert torch.equal(logits(other), logits(fresh(line, others)))
        setattr(theirs, "counts" if "evit" in line else "amounts", counts)
        assert not torch.allclose(logits(other), logits(fresh(line, others)), atol=1e-4)
        # its mode is its own too
        model.eval()
        other.train()(IMAGES)
        assert theirs.survivors is not None
        assert hooks.survivors is None
        assert torch.equal(logits(model), before)
    model.train()(IMAGES)  # what a forward pass with a history left behind does not stand in the way of a copy
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("line", LINES)
def test_removing_gives_the_dense_model_back(line: str) -> None:
    model, _, hooks = prepared(line)
    hooks.remove()
    assert torch.equal(logits(model), logits(vit()))
    assert not any("forward" in vars(block) for block in model.blocks)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("line", LINES)
def test_an_ema_copy_from_before_is_refused(line: str) -> None:
    model = vit()
    early = copy.deepcopy(model)
    engine = Engine(model, recipe(line), steps_per_epoch=8, epochs=1).prepare()
    with pytest.raises(RuntimeError, match="the EMA copy has all its tokens"):
        engine.apply_to(early)


# --- stacks


@pytest.mark.parametrize(
    ("line", "expected"), [("evit: {keep: 0.6, blocks: [0]}", [17, 12, 12, 12]), ("tome: {r: 4}", [17, 13, 13, 9])]
)
def test_quantizers_and_pruners_stack_on_it(line: str, expected: list[int]) -> None:
    lines = (
        line,
        "magnitude_prune: {start: 1st, sparsity: 0.5, targets: ['preset:vit']}",
        "quantize: {start: 2st, groups: [linear, conv, attention]}",
    )
    model, engine, optimizer = attached(*lines, steps=4, depth=2)
    train(engine, optimizer, 4)
    engine.detach()
    assert type(model.blocks[0].attn).__name__ == "QuantAttention"
    assert widths(model.eval()) == expected
    assert float((model.blocks[0].attn.qkv.weight == 0).float().mean()) > 0.3
    assert torch.isfinite(logits(model)).all()


def test_quantized_first_is_the_same() -> None:
    outputs = []
    lines = ["evit: {keep: 0.6, blocks: [0]}", "quantize: {start: 1st, groups: [linear, attention]}"]
    for order in (lines, lines[::-1]):
        model, engine, optimizer = attached(*order, steps=4, depth=2)
        train(engine, optimizer, 4)
        outputs.append(logits(model))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("line", ["evit: {keep: 0.6, blocks: [0, 1]}", "tome: {r: 3}"])
def test_a_head_that_is_off_has_no_say(line: str) -> None:
    """So the model from which it is removed keeps the same tokens."""
    model = vit(depth=3)
    Engine(model, recipe(line), steps_per_epoch=4, epochs=1).prepare()
    before = logits(model)
    sites = find_sites(model, ["heads"])
    install(sites)
    assert torch.allclose(logits(model), before, atol=1e-6)
    for site in sites:
        set_gate(site, torch.tensor([True, False, True]))
    gated = logits(model)
    shrink(model)
    assert model.blocks[0].attn.num_heads == 2
    assert torch.allclose(logits(model), gated, atol=1e-5)


# --- what is refused


def own_class(model: Any) -> None:
    kind = type(model.blocks[2])
    model.blocks[2].__class__ = type("Shifted", (kind,), {"forward": lambda self, x, attn_mask=None: x})


def own_forward(model: Any) -> None:
    model.blocks[2].forward = model.blocks[2].forward


def own_attention(model: Any) -> None:
    class Mixer(nn.Module):
        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            return gelu(x)

    model.blocks[2].attn = Mixer()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (own_class, "block 2 has a forward of its own"),
        (own_forward, "block 2 has a forward of its own"),
        (own_attention, "the attention of block 2 is a Mixer"),
    ],
)
def test_blocks_that_are_not_known_are_refused(change: Any, message: str) -> None:
    for line in LINES:
        model = vit()
        change(model)
        with pytest.raises(RecipeError, match=message):
            Engine(model, recipe(line), steps_per_epoch=8, epochs=1).prepare()


def test_other_blocks_of_timm_are_refused() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock

    for kind in (ResPostBlock, ParallelScalingBlock):
        with pytest.raises(RecipeError, match=rf"evit: .*block \d (is a |\(){kind.__name__}"):
            Engine(vit(block_fn=kind), recipe("evit: {keep: 0.5}"), steps_per_epoch=4, epochs=1).prepare()


@pytest.mark.parametrize("line", LINES)
def test_other_image_sizes_and_masks_are_refused(line: str) -> None:
    model, _, _ = prepared(line.replace("start", "blocks: [0, 1], start"))
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"10 tokens came where 1 \+ 16 were expected"):
            model.train(mode).blocks[0](torch.zeros(1, 10, 24))
        with pytest.raises(ValueError, match="an attn_mask of its own"):
            model.train(mode)(IMAGES, attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_one_reduction_a_model() -> None:
    with pytest.raises(RecipeError, match=r"tome: the model's tokens are reduced already, by evit \(r.yaml:2:5\)"):
        Engine(vit(), recipe("evit: {keep: 0.5}", "tome: {r: 1}"), steps_per_epoch=4, epochs=1).prepare()


# --- precision


@pytest.mark.parametrize("line", LINES)
def test_it_runs_in_mixed_and_in_half_precision(line: str) -> None:
    model, _, _ = prepared(line)
    exact = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(model.train()(IMAGES), LABELS)
        loss.backward()  # type: ignore[no-untyped-call]
        mixed = logits(model)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    half = logits(copy.deepcopy(model).bfloat16(), IMAGES.bfloat16())
    assert half.dtype == torch.bfloat16
    assert float((mixed - exact).norm() / exact.norm()) < 0.5  # other tokens may win where they are close
    assert torch.isfinite(half).all()
