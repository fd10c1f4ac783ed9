"""A manifest counts the heads and units of all modules, those that lost none as well."""

import torch

from ovit_engine.certificate.manifest import Manifest
from ovit_engine.structured.shrink_model import harvest, manifest_of, rebuild, shrink
from tests.structured.shrinking import IMAGES, switch, vit

KEPT = {"heads": [[0, 1, 2, 3], [1], [0, 3]], "units": [list(range(64)), [5, 6], list(range(64))]}


def test_a_block_that_loses_nothing_counts_among_all() -> None:
    model = switch(vit(depth=3), heads=KEPT["heads"], units=KEPT["units"])
    manifest = shrink(model)
    assert str(manifest) == "7 of 12 heads, 130 of 192 units"
    assert [(part.name, len(part.kept)) for part in manifest.parts] == [
        ("blocks.0.attn", 4),
        ("blocks.0.mlp", 64),
        ("blocks.1.attn", 1),
        ("blocks.1.mlp", 2),
        ("blocks.2.attn", 2),
        ("blocks.2.mlp", 64),
    ]
    small = rebuild(vit(depth=3), manifest)
    small.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(small.eval()(IMAGES), model(IMAGES))
    assert manifest_of(small) == manifest


def test_a_harvest_counts_them_too() -> None:
    model = vit(depth=3)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[:, :30] = 0
    assert str(harvest(model)) == "12 of 12 heads, 162 of 192 units"


def test_a_model_in_which_nothing_is_dead_lost_nothing() -> None:
    model = vit()
    names = dict(model.state_dict())
    manifest = harvest(model)
    assert not manifest
    assert str(manifest) == "nothing removed"
    assert all(value is not None and torch.equal(value, names[name]) for name, value in model.state_dict().items())
    assert manifest_of(rebuild(vit(), manifest)) == manifest


def test_a_manifest_of_those_alone_that_lost_some_still_rebuilds() -> None:
    whole = shrink(switch(vit(depth=3), heads=KEPT["heads"], units=KEPT["units"]))
    part = Manifest(parts=tuple(part for part in whole.parts if len(part.kept) < part.of))
    small, again = rebuild(vit(depth=3), whole), rebuild(vit(depth=3), part)
    assert [value.shape for value in small.state_dict().values()] == [
        value.shape for value in again.state_dict().values()
    ]
