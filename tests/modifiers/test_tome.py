"""ToMe: what merges, against a reference that shares no code with it; options."""

from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor

from ovit_engine import Clock, Engine, Recipe, RecipeError
from ovit_engine.flops import count_flops
from ovit_engine.modifiers.tome import ToMe
from ovit_engine.tokens.merging import MergingHooks
from tests.loops import recipe
from tests.tokens import training
from tests.tokens.models import IMAGES, KINDS, logits, vit
from tests.tokens.reference import reference_logits
from tests.tokens.test_merging import merged
from tests.tokens.training import coming, widths


def prepared(options: str = "r: 3", *, steps: int = 8, **model: Any) -> tuple[Any, Engine, MergingHooks]:
    built, engine, hooks = training.prepared(f"tome: {{{options}}}", steps=steps, **model)
    assert isinstance(hooks, MergingHooks)
    return built, engine, hooks


# --- what merges


@pytest.mark.parametrize("proportional", ["true", "false"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_paper_says(kind: str, proportional: str) -> None:
    model, _, _ = prepared(f"r: 4, proportional_attention: {proportional}", **KINDS[kind])
    prefix = model.num_prefix_tokens
    counts: list[int] = []

    def between(number: int, x: Tensor, maps: Tensor, keys: Tensor, state: Any) -> tuple[Tensor, Any]:
        sizes = [1.0] * len(x) if state is None else state
        amount = min(4, (len(x) - prefix) // 2)
        tokens, sizes, _ = merged(keys.mean(0).tolist(), x.tolist(), sizes, prefix, amount)
        counts.append(len(sizes) - prefix)
        assert sum(sizes) == prefix + 16
        return torch.tensor(tokens, dtype=torch.float64), sizes

    def bias(state: Any) -> Tensor | None:
        return None if state is None or proportional == "false" else torch.tensor(state, dtype=torch.float64).log()

    expected = reference_logits(model, between, bias)
    assert counts == [12, 8, 4, 2] * 6
    assert torch.allclose(logits(model), expected, atol=2e-5)
    other = prepared(f"r: 4, proportional_attention: {'false' if proportional == 'true' else 'true'}", **KINDS[kind])
    assert not torch.allclose(expected, logits(other[0]), atol=1e-3)


def test_tokens_are_gone_between_attention_and_mlp_until_one_is_left() -> None:
    model, _, _ = prepared("r: 6", reg_tokens=1)
    expected = [18, 12, 12, 7, 7, 5, 5, 4]  # 2 + 16, 10, 5, 3, 2
    for mode in (True, False):
        assert widths(model.train(mode)) == expected
    lonely, _, _ = prepared("r: 50", depth=6)
    assert widths(lonely.eval()) == [17, 9, 9, 5, 5, 3, 3, 2, 2, 2, 2, 2]
    assert torch.isfinite(logits(lonely)).all()


def test_lists_and_falling_numbers() -> None:
    model, _, hooks = prepared("r: [0, 5, 0, 1]")
    assert hooks.amounts == [0, 5, 0, 1]
    assert widths(model.eval()) == [17, 17, 17, 12, 12, 12, 12, 11]
    _, _, hooks = prepared("r: 2, curve: decreasing")
    assert hooks.amounts == [4, 2, 1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_merged_is_the_dense_model(kind: str) -> None:
    model, _, _ = prepared("r: [0, 0, 0, 0]", **KINDS[kind])
    assert torch.equal(logits(model), logits(vit(**KINDS[kind])))
    with torch.no_grad():
        assert torch.equal(model.train()(IMAGES), logits(vit(**KINDS[kind])))


def test_operations_are_counted_and_those_of_the_paper() -> None:
    """Table 4 there: 2.7 GMACs of 4.6 for DeiT-Small with r = 13; and counted by hand."""
    with torch.device("meta"):
        model = VisionTransformer(embed_dim=384, num_heads=6)
    Engine(model, recipe("tome: {r: 13}"), steps_per_epoch=10, epochs=1).prepare()
    counted = count_flops(model, torch.zeros(1, 3, 224, 224, device="meta")).dense / 2e9
    assert counted == pytest.approx(2.7, rel=0.01)
    total = 196 * 768 * 384 + 384 * 1000
    for place in range(12):
        tokens = 196 - 13 * place
        a, b = tokens // 2, tokens - tokens // 2  # behind the class token the first patch is in an odd place
        total += 4 * (1 + tokens) * 384 * 384 + 2 * (1 + tokens) ** 2 * 384
        total += a * b * 64 + b * 13 * (384 + 1)  # likeness, and the product with ones
        total += 8 * (1 + tokens - 13) * 384 * 384
    assert counted == pytest.approx(total / 1e9, rel=1e-6)


def test_survivors_say_which_patch_each_token_is() -> None:
    model, _, hooks = prepared("r: [5, 3, 0, 2]", init_values=1.0, reg_tokens=1)
    seen = coming(model)
    model.train()(IMAGES)
    left = hooks.survivors
    assert left is not None
    first, last = seen
    assert left.origin.shape == left.weight.shape == last.shape[:2] == (6, 6)
    whole = left.weight > 0
    assert 0 < int(whole.sum()) < whole.numel()
    same = first.gather(1, left.origin.unsqueeze(-1).expand(-1, -1, 24))
    assert torch.allclose(same[whole], last[whole], atol=1e-6)
    assert not torch.isclose(same[~whole], last[~whole], atol=1e-4).all(-1).any()


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("r: 0", "tome.r"),
        ("r: [3, 3]", r"r.yaml:2:15: tome.r: \[3, 3\] has 2 numbers for 4 blocks"),
        ("r: [3, 7, 0, 0]", "tome.r: 7 of 13 patch tokens can't go in block 1: at most half"),
        ("r: [3, 3, 3, 3], curve: decreasing", "'r' lists it for each block"),
        ("curve: decreasing", "tome"),
    ],
)
def test_wrong_options_are_refused(options: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        prepared(options)


def test_more_than_half_of_the_tokens_is_told(caplog: pytest.LogCaptureFixture) -> None:
    prepared("r: 4", depth=2)
    assert not caplog.messages
    _, engine, _ = prepared("r: 6")  # of 16, 10, 5 and 3
    assert caplog.messages == ["tome: at most half of the patch tokens merge in a block: r is [6, 5, 2, 1] here"]
    engine.attach(torch.optim.SGD(engine.model.parameters(), 0.1))
    assert engine.run.history == [(0, "tome/kept", 2 / 16)]


def test_its_timeline_says_how_many() -> None:
    rows = [list(ToMe(r=13, curve=curve).timeline(Clock(10, 20))) for curve in ("constant", "decreasing")]  # type: ignore[arg-type]
    assert rows == [
        [(0, "tokens", "13 merged a block (tome)")],
        [(0, "tokens", "26 merged in the first block, falling to 0 (tome)")],
    ]


def test_the_recipe_is_that_of_the_authors() -> None:
    shipped = Recipe.load("tokens/tome_deit_small")
    (modifier,) = shipped.modifiers
    assert modifier == ToMe(r=13)
    assert (shipped.training.model, shipped.training.epochs) == ("deit_small_patch16_224", 300)
