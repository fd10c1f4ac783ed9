"""Which tensors a target takes."""

from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine.masking.parameters import Slot, clean_name, parameter_slots
from ovit_engine.masking.targets import check_target_syntax, find_slots, match_targets, matching, select
from tests.loops import recipe


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv2d(4, 4, 1, bias=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def names(model: nn.Module, *targets: str) -> list[str]:
    return [slot.name for slot in find_slots(model, targets)]


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("qkv.weight", "qkv.weight"),
        ("module.qkv.weight", "qkv.weight"),
        ("_orig_mod.qkv.weight", "qkv.weight"),
        ("module._orig_mod.qkv.weight", "qkv.weight"),
        ("blocks.0._fsdp_wrapped_module.qkv.weight", "blocks.0.qkv.weight"),
        ("blocks.0._orig_mod.qkv.weight", "blocks.0.qkv.weight"),
        ("submodule.qkv.weight", "submodule.qkv.weight"),
        ("module_list.0.weight", "module_list.0.weight"),
        ("", ""),
    ],
)
def test_prefixes_of_wrappers_are_stripped(name: str, clean: str) -> None:
    assert clean_name(name) == clean


def test_a_wrapped_model_has_the_names_of_its_own() -> None:
    plain = [slot.name for slot in parameter_slots(Block())]
    assert plain == ["qkv.weight", "qkv.bias", "norm.weight", "norm.bias", "conv.weight"]
    wrapped: Any = torch.compile(nn.DataParallel(Block()), backend="eager")
    assert [slot.name for slot in parameter_slots(wrapped)] == plain
    assert plain == [name for name, _ in Block().named_parameters()]


def test_a_parameter_of_the_model_itself_has_a_name() -> None:
    assert [slot.name for slot in parameter_slots(nn.Linear(2, 2))] == ["weight", "bias"]


def test_tied_weights_are_one_under_their_first_name() -> None:
    assert names(Tied(), "re:.*") == ["embed.weight"]


def test_the_slot_follows_a_parameter_that_is_replaced() -> None:
    model = Block()
    (slot,) = find_slots(model, ["qkv.weight"])
    model.qkv.weight = nn.Parameter(torch.ones(12, 4))
    assert slot.tensor is model.qkv.weight
    slot.write(torch.full((12, 4), 2.0))
    assert bool((model.qkv.weight == 2).all())
    assert slot.tensor is model.qkv.weight
    assert not slot.gather().requires_grad
    assert slot == Slot("qkv.weight", model.qkv, "weight")


def test_targets_come_in_the_order_of_the_model_and_once() -> None:
    assert names(Block(), "conv.weight", "qkv.weight", "re:(qkv|conv).weight") == ["qkv.weight", "conv.weight"]


def test_each_target_is_told_what_it_takes() -> None:
    found = match_targets(Block(), [r"re:(qkv|conv)\.weight", "qkv.weight", "qkv.weight"])
    assert {target: [slot.name for slot in slots] for target, slots in found.items()} == {
        r"re:(qkv|conv)\.weight": ["qkv.weight", "conv.weight"],
        "qkv.weight": ["qkv.weight"],
    }


def test_a_target_matches_whole_names() -> None:
    names = ["qkv", "qkv.weight", "a.b.weight"]
    assert matching("qkv.weight", names) == ["qkv.weight"]
    assert matching("re:qkv", names) == ["qkv"]
    assert matching("qkv.weigh.", names) == []
    assert matching(r"re:.*\.weight", names) == ["qkv.weight", "a.b.weight"]
    assert matching(r"re:(?!a).*weight", names) == ["qkv.weight"]


@pytest.mark.parametrize("expression", [r"re:(a|aa)+$", r"re:(a|a)*$"])
def test_an_expression_that_would_never_end(expression: str) -> None:
    with pytest.raises(ValueError, match="takes longer than 1 s to match: simplify it"):
        matching(expression, ["a" * 40 + "b"] * 20)


@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        ("qkv.wieght", "did you mean 'qkv.weight', '"),
        ("attn.qkv.weight", "did you mean 'qkv.weight'"),
        (r"re:.*\.qvk\.weight", "did you mean 'qkv.weight', '"),
        ("0.0", "; there are "),
    ],
)
def test_a_target_that_matches_nothing_shows_the_nearest_names(target: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="matches no parameter of Block") as caught:
        find_slots(Block(), ["conv.weight", target])
    assert repr(target) in str(caught.value)
    assert nearest in str(caught.value)


def test_the_second_name_of_a_tied_weight_is_no_target() -> None:
    with pytest.raises(ValueError, match=r"'head.weight' is tied to 'embed.weight': name that"):
        find_slots(Tied(), ["head.weight"])


def test_one_dimensional_tensors_are_taken_only_by_name() -> None:
    with pytest.raises(ValueError, match=r"'re:\.\*weight' also takes 1 one-dimensional tensor such as 'norm.weight'"):
        find_slots(Block(), ["qkv.weight", "re:.*weight"])
    with pytest.raises(ValueError, match=r"also takes 2 one-dimensional tensors such as 'qkv.bias'"):
        find_slots(Block(), ["norm.weight", "re:.*"])
    assert names(Block(), "norm.weight", "qkv.bias") == ["qkv.bias", "norm.weight"]
    assert names(Block(), "norm.weight", "re:.*weight") == ["qkv.weight", "norm.weight", "conv.weight"]


def test_two_parameters_of_one_name_are_refused() -> None:
    """An adapter that calls what it wraps `module` looks like a wrapper."""

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))
            self.module = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="weight"):
        find_slots(Adapter(), ["weight"])


def test_a_broken_regular_expression() -> None:
    with pytest.raises(ValueError, match=r"'re:\(' is no regular expression: missing \)"):
        check_target_syntax("re:(")
    assert check_target_syntax("re:(a|b)") == "re:(a|b)"
    assert check_target_syntax("(") == "("


def test_select_names_what_it_selects_from() -> None:
    with pytest.raises(ValueError, match="target 'x' matches no layer of Net; there are none"):
        select([], ["x"], what="layer", owner="Net")


def test_one_target_needs_no_list() -> None:
    one, listed = (recipe(f"magnitude_prune: {{sparsity: 0.5, targets: {text}}}") for text in ("a.b", "[a.b]"))
    assert one.modifiers == listed.modifiers
