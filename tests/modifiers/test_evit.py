"""EViT: what stays, against a reference that shares no code with it; the schedule; options."""

from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy

from ovit_engine import Engine, Recipe, RecipeError
from ovit_engine.flops import count_flops
from ovit_engine.tokens import hooks_of
from ovit_engine.tokens.attended import AttendedHooks
from tests.loops import recipe
from tests.tokens import training
from tests.tokens.models import IMAGES, KINDS, logits, vit
from tests.tokens.reference import reference_logits
from tests.tokens.training import LABELS, coming, train, widths


def prepared(options: str = "keep: 0.7", *, steps: int = 8, **model: Any) -> tuple[Any, Engine, AttendedHooks]:
    built, engine, hooks = training.prepared(f"evit: {{{options}}}", steps=steps, **model)
    assert isinstance(hooks, AttendedHooks)
    return built, engine, hooks


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
    assert [(step, value.split()[0]) for step, _, value in rows] == [(0, "all"), (2, "fewer"), (6, "50%")]


def test_what_training_keeps_is_in_the_history_where_it_changes() -> None:
    model = vit(depth=2)
    options = "keep: 0.5, blocks: [1], fuse: false, start: 0st, end: 4st"
    engine = Engine(model, recipe(f"evit: {{{options}}}"), steps_per_epoch=2, epochs=3)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    engine.attach(optimizer)
    train(engine, optimizer, 6)
    assert engine.run.history == [(0, "evit/kept_1", 1.0), (2, "evit/kept_1", 0.75), (4, "evit/kept_1", 0.5)]
    assert [step for step, _, _ in engine.modifiers[0].timeline(engine.run.clock)] == [0, 4]
    (at_once,) = recipe("evit: {keep: 0.5, start: 2st}").modifiers
    assert [step for step, _, _ in at_once.timeline(engine.run.clock)] == [0, 2]


@pytest.mark.parametrize("fuse", ["true", "false"])
def test_survivors_say_which_patch_each_token_is(fuse: str) -> None:
    """Told by tokens that hold the number of their patch, which no block changes."""
    model, _, hooks = prepared(f"keep: 0.6, fuse: {fuse}", init_values=1e-30, reg_tokens=1)
    assert hooks.survivors is None
    seen = coming(model)
    model.train()(IMAGES)
    left = hooks.survivors
    assert left is not None
    first, last = seen
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


# --- options and the recipe


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


def test_the_recipe_is_that_of_the_authors() -> None:
    shipped = Recipe.load("tokens/evit_deit_small_70")
    clock_of = Engine(vit(), Recipe("none", ()), steps_per_epoch=10, epochs=300).run.clock
    (modifier,) = shipped.modifiers
    assert shipped.training.epochs == 300
    assert shipped.training.batch_size == 1024
    assert list(modifier.timeline(clock_of))[-1][0] == 1100  # epoch 110
    assert modifier.model_dump(include={"blocks", "keep", "fuse"}) == {"blocks": [3, 6, 9], "keep": 0.7, "fuse": True}
    assert f"{macs_by_hand(0.7, fuse=True):.2f} of" in shipped.description
