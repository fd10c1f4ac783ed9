"""Recipes: what is read, what is refused and where, and the way back to text."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ovit_engine import Recipe, RecipeError

PRUNE = "modifiers:\n  - magnitude_prune: {sparsity: 0.5, targets: [a], %s}\n"


def parse(text: str, **variables: Any) -> Recipe:
    return Recipe.parse(text, file="r.yaml", **variables)


FULL = """\
# a comment
name: full
description: "what it is: everything"
vars: {sparsity: 0.75, damp: 1e-8, first: 'blocks.0'}
training: {epochs: 3, optimizer: sgd, lr: 5e-2, model: vit_tiny_patch16_224, model_args: {depth: 2}}
modifiers:
  - ovit_prune:
      start: 0ep
      end: 2ep
      every: 50%
      sparsity: {from: 0.4, to: "${sparsity}", curve: cubic}
      targets: ['re:.*\\.(qkv|fc1)\\.weight', "${first}.weight"]
      damp: "${damp}"
  - magnitude_prune: {pattern: "2:4", targets: [b]}
  - magnitude_prune: {pattern: {block: [1, 4]}, sparsity: 0.5, scope: layer, targets: [c]}
  - magnitude_prune: {sparsity: {10st: 0.4, 2ep: 0.6}, targets: [d]}
  - cyclic_lr: {max: 5.0e-4, min: 1e-5, period: 1ep}
  - quantize:
"""


def test_a_full_recipe() -> None:
    recipe = parse(FULL)
    ovit: Any = recipe.modifiers[0]
    assert recipe.name == "full"
    assert (recipe.training.epochs, recipe.training.lr, recipe.training.model_args) == (3, 0.05, {"depth": 2})
    assert (ovit.sparsity.final, ovit.sparsity.curve, ovit.damp) == (0.75, "cubic", 1e-8)
    assert ovit.targets == ["re:.*\\.(qkv|fc1)\\.weight", "blocks.0.weight"]
    assert [m.name for m in recipe.modifiers] == [
        *["ovit_prune", "magnitude_prune", "magnitude_prune", "magnitude_prune", "cyclic_lr", "quantize"]
    ]


def test_variables_are_replaced_by_those_given() -> None:
    recipe = parse(FULL, sparsity=0.6, first="stem")
    ovit: Any = recipe.modifiers[0]
    assert ovit.sparsity.final == 0.6
    assert ovit.targets[1] == "stem.weight"
    assert recipe.vars == {"sparsity": 0.6, "damp": "1e-8", "first": "stem"}
    assert recipe.hash != parse(FULL).hash


def test_a_dump_parses_to_an_equal_recipe() -> None:
    for recipe in (parse(FULL), parse(FULL, sparsity=0.6)):
        again = Recipe.parse(recipe.dump(), file="other.yaml")
        assert again == recipe
        assert again.dump() == recipe.dump()
        assert again.hash == recipe.hash


def test_another_option_makes_another_recipe() -> None:
    assert parse(FULL) != parse(FULL.replace("period: 1ep", "period: 2ep"))
    assert parse(FULL) != parse(FULL.replace("sparsity: 0.5", "sparsity: 0.6"))


def test_comments_and_layout_do_not_change_the_hash() -> None:
    spread = PRUNE % "start: 1ep"
    other = (
        "# why\nmodifiers:\n- magnitude_prune:\n    start: 1ep   # when\n    targets:\n    - a\n    sparsity: 5.0e-1\n"
    )
    assert parse(spread).hash == parse(other).hash


def test_anchors_are_read() -> None:
    text = (
        "modifiers:\n  - magnitude_prune: {sparsity: 0.5, targets: &t [a, b]}\n"
        "  - magnitude_prune: {sparsity: 0.5, targets: *t}\n"
    )
    recipe: Any = parse(text)
    assert recipe.modifiers[1].targets == ["a", "b"]


def test_numbers_as_people_write_them() -> None:
    recipe: Any = parse("modifiers: [{ovit_prune: {sparsity: 0.5, targets: [a], damp: 1e-8, gradients: 1_024}}]")
    assert (recipe.modifiers[0].damp, recipe.modifiers[0].gradients) == (1e-8, 1024)


def test_an_empty_list_of_modifiers_is_a_recipe() -> None:
    assert parse("modifiers: []").modifiers == ()
    assert parse("modifiers: []").name == "r"


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(PRUNE % "start: 1ep")
    assert Recipe.load(path).name == "mine"
    assert Recipe.load(str(path)) == Recipe.load(path)
    path.write_text(PRUNE % "start: 1h")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(f"{path}:2:59: magnitude_prune.start: '1h' is no time")
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(RecipeError, match="not a text file"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match=r"no recipe file '.*nope.yaml' nor a shipped recipe"):
        Recipe.load(tmp_path / "nope.yaml")
    with pytest.raises(RecipeError, match=r"a recipe's text stands where .*: Recipe\.parse\(text\) reads text"):
        Recipe.load("modifiers:\n  - constant_mask: {}\n" * 200)  # longer than a name may be
    with pytest.raises(RecipeError, match="no recipe file"):
        Recipe.load(tmp_path)


times = st.one_of(
    st.integers(0, 10**6).map("{}st".format),
    st.decimals(0, 1000, places=2).map("{}ep".format),
    st.integers(0, 100).map("{}%".format),
)
letters = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])  # PyYAML writes some line breaks as they are
words = st.text(letters, min_size=1).filter(lambda text: not text.startswith(("re:", "preset:")) and "${" not in text)
sparsities = st.floats(0, 0.99)
ranges = st.tuples(sparsities, sparsities, st.sampled_from(["linear", "cubic", "constant"])).map(
    lambda parts: {"from": min(parts[:2]), "to": max(parts[:2]), "curve": parts[2]}
)
amounts = st.one_of(
    sparsities.map(lambda value: {"sparsity": value}),
    st.tuples(ranges, times, times).map(lambda parts: {"sparsity": parts[0], "end": parts[1], "every": parts[2]}),
    st.dictionaries(times, sparsities, min_size=1).map(lambda steps: {"sparsity": steps}),
    st.just({"pattern": "2:4"}),
    sparsities.map(lambda value: {"sparsity": value, "pattern": {"block": [1, 4]}}),
)
pruners = st.tuples(st.sampled_from(["magnitude_prune", "ovit_prune"]), amounts, st.lists(words, min_size=1)).map(
    lambda parts: {parts[0]: {**parts[1], "targets": parts[2]}}
)
rates = st.tuples(st.floats(1e-9, 1e-4), st.floats(1e-4, 10), times).map(
    lambda parts: {"cyclic_lr": {"min": parts[0], "max": parts[1], "period": parts[2]}}
)
names = words.filter(lambda text: text.strip() and text[0] != "." and not set(text) & set("/\\") and len(text) <= 100)
documents = st.fixed_dictionaries(
    {"name": names, "modifiers": st.lists(st.one_of(pruners, rates), max_size=3)},
    optional={"training": st.fixed_dictionaries({"lr": st.floats(1e-12, 1)}), "vars": st.just({"unused": "1e-3"})},
)


@given(documents)
def test_any_recipe_survives_its_dump(document: dict[str, Any]) -> None:
    recipe = parse(yaml.safe_dump(document, allow_unicode=True))
    again = parse(recipe.dump())
    assert again == recipe
    assert again.hash == recipe.hash
    assert recipe.name == document["name"]
    assert [m.name for m in again.modifiers] == [name for entry in document["modifiers"] for name in entry]
    for modifier, entry in zip(again.modifiers, document["modifiers"], strict=True):
        ((_, options),) = entry.items()
        dumped = modifier.model_dump(mode="json", by_alias=True)
        assert {key: dumped[key] for key in options if key != "sparsity"} == {
            key: value for key, value in options.items() if key != "sparsity"
        }
