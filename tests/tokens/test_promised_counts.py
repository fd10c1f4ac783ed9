"""What modifiers say of tokens is what their models do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovit_engine import Engine
from ovit_engine.certificate.token_counts import TokenCounts
from ovit_engine.tokens import hooks_of
from tests.loops import recipe
from tests.tokens.models import logits, vit

CASES: list[tuple[str, dict[str, Any]]] = [
    ("dynamic_vit: {keep: 0.7}", {}),
    ("dynamic_vit: {prune: 0.3, blocks: [0, 3]}", {"distilled": True}),
    ("dynamic_vit: {keep_tokens: [16, 9, 9]}", {}),
    ("dynamic_vit: {keep: 0.29, blocks: [1]}", {"reg_tokens": 4}),
    ("dynamic_vit: {keep: 0.5}", {"depth": 1, "img_size": 40}),
    ("svite_tokens: {keep: 0.6}", {"reg_tokens": 2}),
    ("svite_tokens: {keep_tokens: [16]}", {}),
    ("evit: {keep: 0.7}", {}),
    ("evit: {keep: 0.7, fuse: false, blocks: [0, 3]}", {"distilled": True}),
    ("evit: {keep_tokens: [16, 8, 3]}", {}),
    ("tome: {r: 3}", {"qk_norm": True}),
    ("tome: {r: 99}", {}),
    ("tome: {r: 2, curve: decreasing}", {}),
    ("tome: {r: [8, 0, 1, 1]}", {"distilled": True}),
]


def seen_by(model: Any) -> TokenCounts:
    """Counts that a forward pass in eval mode comes by, of a model and its hooks."""
    counts: list[int] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: Any) -> None:
        counts.append(args[0].shape[1])

    modules = [*(block.attn for block in model.blocks), model.norm]
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    logits(model)
    for handle in handles:
        handle.remove()
    entering = model.patch_embed.num_patches + model.num_prefix_tokens
    return TokenCounts(entering=entering, attention=tuple(counts[:-1]), leaving=counts[-1])


@pytest.mark.parametrize(("line", "options"), CASES, ids=[line for line, _ in CASES])
def test_the_promise_is_what_the_model_does_and_what_the_recipe_says(line: str, options: dict[str, Any]) -> None:
    images = options.get("img_size", 32)
    model = vit(**options)
    given = recipe(line)
    Engine(model, given, steps_per_epoch=1, epochs=1).prepare()
    hooks = hooks_of(model)
    assert hooks is not None
    promised = hooks.token_counts()
    if images == 32:
        assert promised == seen_by(model)
    else:
        assert promised.entering == 26


def test_training_that_keeps_more_promises_what_inference_keeps() -> None:
    model = vit()
    engine = Engine(model, recipe("evit: {keep: 0.5, start: 1ep, end: 2ep}"), steps_per_epoch=2, epochs=3).prepare()
    engine.attach(torch.optim.SGD(model.parameters(), 0.0))
    hooks = hooks_of(model)
    assert hooks is not None
    assert hooks.token_counts() == seen_by(model)
    assert hooks.token_counts().leaving < 10


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("dynamic_vit: {keep: 0.7}", "138, 97, 68 before the attention of blocks 3, 6, 9"),
        ("dynamic_vit: {prune: 0.2}", "157, 126, 101 before the attention of blocks 3, 6, 9"),
        ("svite_tokens: {keep: 0.9}", "177 before the attention of block 0"),
        ("evit: {keep: 0.7}", "140, 100, 72 before the attention of blocks 4, 7, 10"),  # 138, 98, 70 kept, one fused
        ("evit: {keep: 0.7, fuse: false}", "139, 98, 69 before the attention of blocks 4, 7, 10"),
        (
            "tome: {r: [98, 49, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]}",
            "99, 50 before the attention of blocks 1, 2; 41 out of the last",
        ),
    ],
)
def test_published_counts_of_deit_small(line: str, counts: str) -> None:
    """197 tokens in 12 blocks, as DeiT-Small has: 16 pixels a patch of 224, here 2 of 28."""
    model = vit(img_size=28, patch_size=2, depth=12)
    Engine(model, recipe(line), steps_per_epoch=1, epochs=1).prepare()
    hooks = hooks_of(model)
    assert hooks is not None
    assert str(hooks.token_counts()) == f"197 -> {counts}"
