"""EViT: what stays, against a reference that shares no code with it; the schedule; copies, stacks, resuming."""

import copy
import pickle
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from ovit_engine import Calibration, Engine, Recipe, RecipeError
from ovit_engine.flops import count_flops
from ovit_engine.gates import find_sites, install, set_gate
from ovit_engine.shrink import shrink
from ovit_engine.targets import parameter_slots
from ovit_engine.tokens import hooks_of
from ovit_engine.tokens.attended import AttendedHooks
from tests.loops import recipe
from tests.tokens.models import IMAGES, KINDS, logits, vit
from tests.tokens.reference import reference_logits

LABELS = torch.arange(len(IMAGES)) % 5


def prepared(options: str = "keep: 0.7", *, steps: int = 8, **model: Any) -> tuple[Any, Engine, AttendedHooks]:
    built = vit(**model)
    engine = Engine(built, recipe(f"evit: {{{options}}}"), steps_per_epoch=steps, epochs=1).prepare()
    hooks = hooks_of(built)
    assert isinstance(hooks, AttendedHooks)
    return built, engine, hooks


def train(engine: Engine, optimizer: torch.optim.Optimizer, steps: int) -> None:
    engine.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        engine.loss(cross_entropy(engine.model(IMAGES), LABELS)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def widths(model: Any) -> list[int]:
    """Tokens that come into the attention and into the MLP of each block, prefix and all."""
    seen: list[int] = []
    handles = [
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for block in model.blocks
        for norm in (block.norm1, block.norm2)
    ]
    model(IMAGES)
    for handle in handles:
        handle.remove()
    return seen


# --- what stays


@pytest.mark.parametrize("fuse", ["true", "false"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_paper_says(kind: str, fuse: str) -> None:
    """The map of attention in full and in float64, images one by one, the rows of class and distillation token."""
    model, _, hooks = prepared(f"keep: 0.7, fuse: {fuse}", **KINDS[kind])
    readers = 2 if kind == "distilled" else 1
    prefix = model.num_prefix_tokens

    def between(number: int, x: Tensor, maps: Tensor, keys: Tensor, state: Any) -> tuple[Tensor, Any]:
        if number == 0:
            return x, None
        scores = maps[:, :readers, prefix:].mean((0, 1))
        keep = -(-7 * len(scores) // 10)  # rounded up
        order = scores.argsort(descending=True)
        parts = [x[:prefix], x[prefix:][order[:keep]]]
        if fuse == "true":
            parts.append(sum(scores[place] * x[prefix + place] for place in order[keep:])[None])  # type: ignore[index]
        return torch.cat(parts), None

    expected = reference_logits(model, between)
    assert hooks.counts == ([12, 10, 8] if fuse == "true" else [12, 9, 7])
    assert torch.allclose(logits(model), expected, atol=2e-5)
    assert not torch.allclose(expected, logits(vit(**KINDS[kind])), atol=1e-2)  # dropping does something


@pytest.mark.parametrize("fused_kernel", [True, False])
def test_tokens_are_gone_between_attention_and_mlp(fused_kernel: bool) -> None:
    model, _, _ = prepared("keep: 0.5, blocks: [0, 2], fuse: true", reg_tokens=2)
    for block in model.blocks:
        block.attn.fused_attn = fused_kernel
    expected = [19, 12, 12, 12, 12, 9, 9, 9]  # 3 + 16, 3 + 8 + 1, 3 + 5 + 1
    for mode in (True, False):
        assert widths(model.train(mode)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_kept_is_the_dense_model(kind: str) -> None:
    model, _, hooks = prepared("keep: 1.0", **KINDS[kind])
    assert hooks.counts == [16, 16, 16]
    assert torch.equal(logits(model), logits(vit(**KINDS[kind])))
    model.train()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), logits(vit(**KINDS[kind])))


def test_blocks_that_drop_nothing_drop_paths_and_scale_layers_as_before() -> None:
    outputs = []
    for options in ("keep: 1.0", None):
        options_of_model = {"init_values": 0.5, "drop_path_rate": 0.5, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2}
        model = vit(**options_of_model)
        if options is not None:
            Engine(model, recipe(f"evit: {{{options}}}"), steps_per_epoch=4, epochs=1).prepare()
        torch.manual_seed(5)
        outputs.append(model.train()(IMAGES))
    assert torch.equal(*outputs)


def test_listed_counts_are_kept_besides_the_fused_token() -> None:
    for fuse, expected in (("true", [17, 10, 10, 7, 7, 4]), ("false", [17, 9, 9, 6, 6, 3])):
        model, _, hooks = prepared(f"keep_tokens: [8, 5, 2], fuse: {fuse}, blocks: [0, 1, 2]")
        assert hooks.counts == [8, 5, 2]
        assert widths(model.eval())[:6] == expected
        assert widths(model.train())[:6] == expected


def test_inference_is_the_same_every_time_and_for_any_batch() -> None:
    model, _, _ = prepared()
    whole = logits(model)
    assert torch.equal(whole, logits(model))
    singles = torch.cat([logits(model, IMAGES[i : i + 1]) for i in range(6)])
    assert torch.allclose(whole, singles, atol=1e-5)


def macs_by_hand(keep: float, *, fuse: bool) -> float:
    """Multiply-adds of DeiT-Small with stages in blocks 3, 6 and 9, in billions."""
    total, tokens = 196 * 768 * 384 + 384 * 1000, 196
    for place in range(12):
        total += 4 * (1 + tokens) * 384 * 384 + 2 * (1 + tokens) ** 2 * 384
        if place in (3, 6, 9):
            kept = -int(-keep * tokens // 1)  # rounded up
            total += (1 + tokens) * 384  # the class token's row once more
            total += (tokens - kept) * 384 * fuse
            tokens = kept + fuse
        total += 8 * (1 + tokens) * 384 * 384
    return total / 1e9


@pytest.mark.parametrize(("keep", "published"), [(0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3)])
def test_operations_are_those_that_the_authors_report(keep: float, published: float) -> None:
    """In GMACs, with a digit behind the point."""
    for fuse in (True, False):
        assert macs_by_hand(keep, fuse=fuse) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(("keep", "fuse"), [(0.7, True), (0.5, False)])
def test_operations_are_really_saved(keep: float, fuse: bool) -> None:
    with torch.device("meta"):
        model = VisionTransformer(embed_dim=384, num_heads=6)
    line = recipe(f"evit: {{keep: {keep}, fuse: {str(fuse).lower()}}}")
    Engine(model, line, steps_per_epoch=10, epochs=1).prepare()
    counted = count_flops(model, torch.zeros(1, 3, 224, 224, device="meta")).dense / 2e9
    assert counted == pytest.approx(macs_by_hand(keep, fuse=fuse), rel=1e-6)


# --- training


def test_training_keeps_more_tokens_for_a_time() -> None:
    model, engine, hooks = prepared("keep: 0.5, blocks: [1], fuse: false, start: 2st, end: 6st", depth=2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    engine.attach(optimizer)
    seen = []
    for _ in range(8):
        seen.append(widths(model.train())[-1] - 1)
        assert widths(model.eval())[-1] - 1 == 8  # inference is what will be deployed, all the time
        train(engine, optimizer, 1)
    # 0.5 + 0.25 (1 + cos) of 16 for 0, 45, 90 and 135 degrees, rounded up
    assert seen == [16, 16, 16, 15, 12, 10, 8, 8]
    engine.detach()
    assert hooks.training_counts == [8]
    rows = list(engine.modifiers[0].timeline(engine.run.clock))
    assert [step for step, _, _ in rows] == [0, 6]


def test_a_resumed_run_keeps_as_many() -> None:
    """At every step, with a schedule under way; weights are equal to the last bit."""
    results = []
    for cut in (None, 1, 3, 5):
        options = "keep: 0.5, blocks: [0], start: 1st, end: 6st"
        model, engine, _ = prepared(options, depth=1)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        engine.attach(optimizer)
        train(engine, optimizer, 8 if cut is None else cut)
        if cut is not None:
            states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, engine)]
            model, engine, _ = prepared(options, depth=1, seed=9)
            optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
            for part, state in zip((model, optimizer, engine), states, strict=True):
                part.load_state_dict(state)
            engine.attach(optimizer)
            train(engine, optimizer, 8 - cut)
        engine.detach()
        results.append(model.state_dict())
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@pytest.mark.parametrize("fuse", ["true", "false"])
def test_survivors_say_which_patch_each_token_is(fuse: str) -> None:
    """Told by tokens that hold the number of their patch, which no block changes."""
    model, _, hooks = prepared(f"keep: 0.6, fuse: {fuse}", init_values=1e-30, reg_tokens=1)
    assert hooks.survivors is None
    for block in model.blocks:  # so small a scale that blocks add nothing
        block.ls1.gamma.data.fill_(0.0)
        block.ls2.gamma.data.fill_(0.0)
    coming: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: coming.append(args[0]))
    model.norm.register_forward_pre_hook(lambda _, args: coming.append(args[0]))
    model.train()(IMAGES)
    left = hooks.survivors
    assert left is not None
    first, last = (tokens[:, 2:].detach() for tokens in coming)
    assert left.origin.shape == left.weight.shape == last.shape[:2]
    assert set(left.weight.unique().tolist()) <= {0.0, 1.0}
    same = first.gather(1, left.origin.unsqueeze(-1).expand(-1, -1, 24))
    assert torch.equal(same[left.weight > 0], last[left.weight > 0])
    fused = (left.weight == 0).sum(1)
    if fuse == "true":
        assert (fused >= 1).all()
        assert (left.weight[:, -1] == 0).all()
    else:
        assert (fused == 0).all()
    logits(model)
    assert hooks.survivors is left  # inference leaves no trace
    hooks.end_step(1)
    assert hooks.survivors is None


def test_gradients_reach_what_attention_is_made_of_by_the_fused_token() -> None:
    """Of a last block whose MLP and attention add nothing, only through the weights of what is fused."""
    gradients = []
    for fuse in ("true", "false"):
        model, _, _ = prepared(f"keep: 0.5, blocks: [0], fuse: {fuse}", depth=2, init_values=1.0)
        model.blocks[0].ls1.gamma.data.fill_(0.0)
        cross_entropy(model.train()(IMAGES), LABELS).backward()  # type: ignore[no-untyped-call]
        gradients.append(float(model.blocks[0].attn.qkv.weight.grad.abs().max()))
    assert gradients[0] > 1e-5
    assert gradients[1] == 0


@pytest.mark.parametrize("passes", [1, 2])
def test_checkpointing_changes_nothing(passes: int) -> None:
    found = []
    for checkpointing in (False, True):
        model, engine, hooks = prepared("keep: 0.5, start: 0st, end: 4st")
        model.set_grad_checkpointing(checkpointing)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        engine.attach(optimizer)
        train(engine, optimizer, 2)
        model.zero_grad()
        loss = sum(cross_entropy(model(IMAGES[: 6 - i]), LABELS[: 6 - i]) for i in range(passes))
        left = hooks.survivors
        assert left is not None
        assert len(left.origin) == 7 - passes
        loss.backward()  # type: ignore[union-attr]
        assert hooks.survivors is left
        found.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.allclose(plain, checkpointed, atol=1e-6)


def test_a_teacher_compares_the_tokens_that_are_left() -> None:
    model = vit(depth=2)
    lines = ("evit: {keep: 0.5, blocks: [0]}", "distill: {logits: 0, tokens: 1.0}")
    engine = Engine(model, recipe(*lines), steps_per_epoch=2, epochs=1).prepare()
    engine.attach(torch.optim.SGD(model.parameters(), 1e-2))
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda _m, _a, output: seen.append(output))
    output = model.train()(IMAGES)
    hooks = hooks_of(model)
    assert hooks is not None
    left = hooks.survivors
    assert left is not None
    term = float(engine.loss(output.sum() * 0).detach())
    assert engine.run.teacher is not None
    with torch.no_grad():
        theirs = engine.run.teacher.module.forward_features(IMAGES)[:, 1:]  # type: ignore[operator]
    ours = seen[0][:, 1:]
    parts = [
        float((ours[image, place] - theirs[image, left.origin[image, place]]).square().mean().detach())
        for image in range(6)
        for place in range(8)  # and not the fused one, which comes last
    ]
    assert term == pytest.approx(sum(parts) / len(parts), rel=1e-4)


# --- copies


def test_a_copy_drops_by_its_own_weights_and_counts() -> None:
    model, engine, hooks = prepared("keep: 0.6, start: 4st")
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    for other in (copy.deepcopy(model), ModelEmaV3(model).module, pickle.loads(pickle.dumps(model))):
        before = logits(model)
        assert torch.equal(logits(other), before)
        theirs = hooks_of(other)
        assert isinstance(theirs, AttendedHooks)
        assert theirs is not hooks
        for block in other.blocks:
            block.attn.qkv.weight.data.neg_()
        assert torch.allclose(logits(other), logits(randomised_like(other)), atol=1e-5)
        theirs.counts = [3, 2, 1]
        assert not torch.allclose(logits(other), logits(randomised_like(other)), atol=1e-4)
        assert torch.equal(logits(model), before)
    model.train()(IMAGES)  # what a forward pass with a history left behind does not stand in the way of a copy
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def randomised_like(model: Any) -> nn.Module:
    """A new model with the weights of `model`, under the recipe of the test above."""
    new, _, _ = prepared("keep: 0.6, start: 4st")
    new.load_state_dict(model.state_dict())
    return new  # type: ignore[no-any-return]


def test_removing_gives_the_dense_model_back() -> None:
    model, _, hooks = prepared()
    hooks.remove()
    assert torch.equal(logits(model), logits(vit()))
    assert not any("forward" in vars(block) for block in model.blocks)
    assert not any(module._forward_hooks for module in model.modules())


# --- stacks


def test_quantizers_and_pruners_stack_on_it() -> None:
    model = vit(depth=2)
    lines = (
        "evit: {keep: 0.6, blocks: [0]}",
        "magnitude_prune: {start: 1st, sparsity: 0.5, targets: ['preset:vit']}",
        "quantize: {start: 2st, groups: [linear, conv, attention]}",
    )
    engine = Engine(model, recipe(*lines), steps_per_epoch=4, epochs=1).prepare()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    engine.attach(optimizer)
    train(engine, optimizer, 4)
    engine.detach()
    assert type(model.blocks[0].attn).__name__ == "QuantAttention"
    assert widths(model.eval()) == [17, 12, 12, 12]
    assert float((model.blocks[0].attn.qkv.weight == 0).float().mean()) > 0.3
    assert torch.isfinite(logits(model)).all()


def test_quantized_first_is_the_same() -> None:
    outputs = []
    lines = ["evit: {keep: 0.6, blocks: [0]}", "quantize: {start: 1st, groups: [linear, attention]}"]
    for order in (lines, lines[::-1]):
        model = vit(depth=2)
        engine = Engine(model, recipe(*order), steps_per_epoch=4, epochs=1).prepare()
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        engine.attach(optimizer)
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


def test_gradients_for_pruners_are_those_of_inference() -> None:
    model, _, hooks = prepared("keep: 0.5, start: 4st")
    slots = [slot for slot in parameter_slots(model) if slot.name.endswith(("qkv.weight", "fc1.weight"))]
    data = torch.utils.data.TensorDataset(IMAGES, LABELS)
    model.train()
    (found,) = Calibration(data, cross_entropy).gradients(model, slots, count=1, images_per_gradient=6, chunk=1)
    assert model.training
    assert hooks.survivors is None
    expected = torch.autograd.grad(cross_entropy(model.eval()(IMAGES), LABELS), [slot.tensor for slot in slots])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours[0], theirs, atol=1e-5)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("fuse: false", "say once how many tokens stay"),
        ("keep: 0.5, start: 9ep", r"r.yaml:2:30: evit.start: '9ep' is step 72, past the end"),
        ("keep: 0.5, start: 4st, end: 2st", "evit.end: '2st' comes before the start at '4st'"),
        ("keep: 0.5, blocks: [7]", r"evit.blocks: \[7\]: the model has blocks 0 to 3"),
        ("keep_tokens: [9, 4]", r"evit.keep_tokens: \[9, 4\] has 2 counts for 3 stages"),
        ("keep_tokens: [9, 10, 4]", "10 tokens can't be kept of 9"),
    ],
)
def test_wrong_options_are_refused(options: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        prepared(options)


def with_block(change: Any) -> Any:
    model = vit()
    change(model)
    return model


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
    for line in ("evit: {keep: 0.5}", "tome: {r: 2}"):
        with pytest.raises(RecipeError, match=message):
            Engine(with_block(change), recipe(line), steps_per_epoch=4, epochs=1).prepare()


def test_other_blocks_of_timm_are_refused() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock

    for kind in (ResPostBlock, ParallelScalingBlock):
        with pytest.raises(RecipeError, match=rf"evit: .*block \d (is a |\(){kind.__name__}"):
            Engine(vit(block_fn=kind), recipe("evit: {keep: 0.5}"), steps_per_epoch=4, epochs=1).prepare()


def test_other_image_sizes_and_masks_are_refused() -> None:
    model, _, _ = prepared("keep: 0.5, blocks: [0, 1]")
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"10 tokens came where 1 \+ 16 were expected"):
            model.train(mode).blocks[0](torch.zeros(1, 10, 24))
        with pytest.raises(ValueError, match="an attn_mask of its own"):
            model.train(mode)(IMAGES, attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_one_reduction_a_model() -> None:
    with pytest.raises(RecipeError, match="tome: the model's tokens are reduced already"):
        Engine(vit(), recipe("evit: {keep: 0.5}", "tome: {r: 1}"), steps_per_epoch=4, epochs=1).prepare()


def test_an_ema_copy_from_before_is_refused() -> None:
    model = vit()
    early = copy.deepcopy(model)
    engine = Engine(model, recipe("evit: {keep: 0.5}"), steps_per_epoch=4, epochs=1).prepare()
    with pytest.raises(RuntimeError, match="the EMA copy has all its tokens"):
        engine.apply_to(early)


# --- types, compiled


def test_it_runs_in_mixed_and_in_half_precision() -> None:
    for line in ("evit: {keep: 0.5}", "tome: {r: 3}"):
        model = vit()
        Engine(model, recipe(line), steps_per_epoch=4, epochs=1).prepare()
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


@pytest.mark.parametrize("line", ["evit: {keep: 0.5, blocks: [0]}", "tome: {r: 2}"])
def test_compiled_it_is_one_graph_and_the_same(line: str) -> None:
    losses = []
    for compiled in (False, True):
        model = vit(depth=2)
        engine = Engine(model, recipe(line), steps_per_epoch=4, epochs=1).prepare()
        network = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        engine.attach(optimizer)
        model.train()
        for _ in range(2):
            optimizer.zero_grad()
            loss = engine.loss(cross_entropy(network(IMAGES), LABELS))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
        hooks = hooks_of(model)
        assert hooks is not None
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-6)
    model.eval()
    with torch.no_grad():
        whole = torch.compile(model, backend="eager", fullgraph=True)(IMAGES)
    assert torch.allclose(whole, logits(model), atol=1e-6)


# --- the recipe


def test_the_recipe_is_that_of_the_authors() -> None:
    shipped = Recipe.load("tokens/evit_deit_small_70")
    clock_of = Engine(vit(), Recipe("none", ()), steps_per_epoch=10, epochs=300).run.clock
    (modifier,) = shipped.modifiers
    assert shipped.training.epochs == 300
    assert shipped.training.batch_size == 1024
    assert list(modifier.timeline(clock_of))[-1][0] == 1100  # epoch 110
    assert modifier.model_dump(include={"blocks", "keep", "fuse"}) == {"blocks": [3, 6, 9], "keep": 0.7, "fuse": True}
    assert f"{macs_by_hand(0.7, fuse=True):.2f} of" in shipped.description
