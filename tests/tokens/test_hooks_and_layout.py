"""The object behind the hooks: copies, pickles, models that it does not fit."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ovit_engine.tokens import TokenHooks, find_layout, gather_tokens, hooks_of
from ovit_engine.tokens.layout import Layout
from tests.tokens.models import IMAGES, logits, vit
from tests.tokens.training import prepared


class FirstTokens(TokenHooks):
    """Keeps the first few patch tokens before block 1."""

    def __init__(self, layout: Layout, keep: int) -> None:
        super().__init__(layout)
        self.keep = keep

    def register(self, vit: Any) -> list[RemovableHandle]:
        return [vit.blocks[1].register_forward_pre_hook(self.drop)]

    def patches_left(self) -> list[tuple[int, int]]:
        return [(1, self.keep)]

    def drop(self, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        index = torch.arange(self.keep).expand(args[0].shape[0], -1)
        return gather_tokens(args[0], index, self.layout.prefix)


def reduced(keep: int = 5) -> tuple[Any, FirstTokens]:
    model = vit()
    hooks = FirstTokens(find_layout(model), keep)
    hooks.install(model)
    return model, hooks


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_hooks_of_its_own(way: Any) -> None:
    model, hooks = reduced()
    other = way(model)
    theirs = hooks_of(other)
    assert isinstance(theirs, FirstTokens)
    assert theirs is not hooks
    before = logits(model)
    assert torch.equal(logits(other), before)
    theirs.keep = 16
    assert not torch.allclose(logits(other), before, atol=1e-3)
    assert torch.equal(logits(model), before)
    theirs.remove()
    assert not any(block._forward_pre_hooks for block in other.blocks)
    assert len(model.blocks[1]._forward_pre_hooks) == 1


def test_removing_gives_the_dense_model_back() -> None:
    model, hooks = reduced()
    hooks.remove()
    assert torch.equal(logits(model), logits(vit()))


def test_hooks_are_found_inside_wrappers() -> None:
    model, hooks = reduced()
    assert hooks_of(torch.optim.swa_utils.AveragedModel(model)) is not None
    assert hooks_of(nn.Sequential(nn.Identity(), model)) is hooks
    assert hooks_of(vit()) is None
    with pytest.raises(ValueError, match="are reduced already"):
        FirstTokens(hooks.layout, 3).install(model)


@pytest.mark.parametrize(("options", "prefix"), [({}, 1), ({"distilled": True}, 2), ({"reg_tokens": 4}, 5)])
def test_the_layout_counts_prefix_tokens(options: dict[str, Any], prefix: int) -> None:
    model = vit(**options)
    assert find_layout(nn.Sequential(model)) == Layout(prefix, 16, 24, 4)
    assert model.forward_features(IMAGES).shape == (6, prefix + 16, 24)


REFUSED: dict[str, tuple[Any, str]] = {
    "average pooling": (lambda: vit(global_pool="avg", class_token=False), "its global_pool is 'avg'"),
    "any size": (lambda: vit(dynamic_img_size=True), "dynamic_img_size lets the number of patches vary"),
    "patch dropout": (lambda: vit(patch_drop_rate=0.5), "patch_drop_rate drops patches at random"),
    "no transformer": (lambda: nn.Linear(2, 2), "Linear has no vision transformer whose tokens can be reduced"),
    "two": (lambda: nn.ModuleList([vit(), vit()]), "ModuleList has 2 vision transformers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_need_all_tokens_are_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        find_layout(make())


def test_other_blocks_are_refused() -> None:
    model = vit()

    class Block(nn.Module):
        attn = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return x

    model.blocks[2] = Block()
    with pytest.raises(ValueError, match=r"block 2 \(Block\) takes no attn_mask"):
        find_layout(model)


@pytest.mark.parametrize(
    ("line", "hooks"),
    [
        ("dynamic_vit: {keep: 0.7, blocks: [0, 2]}", [1, 0, 1, 0]),
        ("svite_tokens: {keep: 0.6}", [1, 0, 0, 0]),
        ("evit: {keep: 0.5, blocks: [1]}", [0, 0, 0, 0]),
        ("tome: {r: 2}", [0, 0, 0, 0]),
    ],
)
def test_what_is_deployed_has_nothing_of_training(line: str, hooks: list[int]) -> None:
    model, engine, _ = prepared(line, drawn=True)
    before = [len(block._forward_pre_hooks) for block in model.blocks]
    baked = copy.deepcopy(model)
    baked.train()(IMAGES)
    (modifier,) = engine.modifiers
    modifier.bake(baked)
    assert [len(block._forward_pre_hooks) for block in baked.blocks] == hooks
    left = vars(baked._token_hooks)
    assert not any(left.get(name) for name in ("survivors", "_decisions", "_biases", "_untaken", "_kept"))
    assert torch.equal(logits(baked), logits(model))
    assert [len(block._forward_pre_hooks) for block in model.blocks] == before
