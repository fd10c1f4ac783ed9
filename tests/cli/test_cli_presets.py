"""What `ovit show` and `ovit validate` tell of the presets in a recipe."""

from pathlib import Path

from tests.cli.conftest import Ovit

RECIPE = """
name: one
training: {{model: {model}, epochs: 2}}
modifiers:
  - magnitude_prune: {{sparsity: 0.5, targets: {targets}}}
"""


def write(model: str = "deit_tiny_patch16_224", targets: str = "preset:vit") -> None:
    Path("one.yaml").write_text(RECIPE.format(model=model, targets=targets))


def test_validate_counts_each_part(ovit: Ovit) -> None:
    write(targets="[preset:vit, head.weight]")
    done = ovit("validate", "one.yaml")
    assert done.exit_code == 0, done.output
    assert [" ".join(line.split()) for line in done.output.splitlines()] == [
        "modifier targets tensors weights",
        "magnitude_prune head.weight 1 192,000",
        "magnitude_prune preset:vit qkv 12 1,327,104",
        "magnitude_prune preset:vit proj 12 442,368",
        "magnitude_prune preset:vit fc1 12 1,769,472",
        "magnitude_prune preset:vit fc2 12 1,769,472",
        "one: ok on deit_tiny_patch16_224",
    ]


def test_validate_on_another_model_names_the_preset_that_fits(ovit: Ovit) -> None:
    write()
    done = ovit("validate", "one.yaml", "--model", "resnet50d")
    assert done.exit_code != 0
    assert "one.yaml:5:47: magnitude_prune.targets: preset:vit finds no qkv, no proj, no fc1, no fc2" in done.output
    assert "'preset:resnet' fits" in done.output


def test_show_tells_what_it_takes_of_the_model_of_the_recipe(ovit: Ovit) -> None:
    write("resnet50d", "preset:resnet")
    expected = (
        "magnitude_prune on preset:resnet: conv 20,676,608, downsample 2,768,896, deep stem 27,648; "
        "dense: first convolution, classifier"
    )
    assert ovit("show", "one.yaml").output.splitlines()[-1] == expected
    write("resnet18", "preset:resnet")
    assert "downsample 172,032; dense: first" in ovit("show", "one.yaml").output
    write("swin_tiny_patch4_window7_224", "preset:resnet")
    done = ovit("show", "one.yaml")
    assert done.exit_code != 0
    assert "one.yaml:5:47: magnitude_prune.targets: preset:resnet finds no conv, no downsample" in done.output


def test_show_without_a_model_says_it_in_words(ovit: Ovit) -> None:
    Path("free.yaml").write_text("modifiers:\n  - magnitude_prune: {sparsity: 0.5, targets: preset:vit}\n")
    line = "magnitude_prune on preset:vit: qkv, proj, fc1, fc2; dense: patch embedding, head"
    assert ovit("show", "free.yaml").output.splitlines()[-1] == line
