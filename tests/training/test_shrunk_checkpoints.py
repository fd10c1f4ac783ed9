"""Weights of models that lost heads and units: training starts from them, goes on, and is restored for export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import load_point
from ovit_engine.structured.gates import find_sites, install, installed, set_gate
from ovit_engine.structured.shrink_model import manifest_of, shrink
from ovit_engine.training.api import with_training
from ovit_engine.training.checkpoint import load_checkpoint, load_weights
from ovit_engine.training.models import make_model
from ovit_engine.training.runs import restore
from tests.training.conftest import tiny_recipe
from tests.training.test_trainer import InterruptedRunError, run

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
RECIPE = tiny_recipe()
TEN = with_training(RECIPE, model_args={**RECIPE.training.model_args, "num_classes": 10})


def gated() -> nn.Module:
    model = make_model(TEN.training).eval()
    install(find_sites(model))
    for site in installed(model):
        set_gate(site, torch.arange(site.count) % 2 == 1)
    return model


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A checkpoint as users write one, and its model."""
    model = gated()
    manifest = shrink(model)
    torch.save({"model": model.state_dict(), "manifest": manifest.model_dump(mode="json")}, tmp_path / "small.pt")
    return tmp_path / "small.pt", model


def test_weights_beside_a_manifest_make_the_model_as_small(small: tuple[Path, nn.Module]) -> None:
    path, wanted = small
    model = make_model(TEN.training).eval()
    load_weights(model, path)
    assert manifest_of(model) == manifest_of(wanted)
    assert torch.equal(model(IMAGES), wanted(IMAGES))


def test_what_gates_switched_off_is_removed(tmp_path: Path) -> None:
    source, model = gated(), make_model(with_training(TEN, seed=5).training).eval()
    torch.save(source.state_dict(), tmp_path / "gated.pt")
    load_weights(model, tmp_path / "gated.pt")
    assert str(manifest_of(model)) == "1 of 2 heads, 32 of 64 units"
    assert not installed(model)
    assert (model(IMAGES) - source(IMAGES)).abs().max() < 1e-5


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    torch.save({"model": gated().state_dict(), "manifest": {"heads": 3}}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="holds no manifest of heads and units: heads: Extra inputs"):
        load_weights(make_model(TEN.training), tmp_path / "odd.pt")


def test_a_small_model_trains_resumes_sweeps_and_is_restored(tmp_path: Path, small: tuple[Path, nn.Module]) -> None:
    path, source = small
    sweep = "sparsity: 0.5, sweep: {sparsity: [0.5], onnx: false}"
    prune = f"[{{magnitude_prune: {{start: 1ep, {sweep}, targets: ['re:blocks.*(qkv|fc1).weight']}}}}]"
    recipe: Any = tiny_recipe(prune, epochs=2)
    whole = run(recipe, tmp_path / "whole", checkpoint=path)
    assert manifest_of(whole.model) == manifest_of(source)
    with pytest.raises(InterruptedRunError):
        run(recipe, tmp_path / "broken", stop_before=2, checkpoint=path)
    resumed = run(recipe, tmp_path / "broken", resume=tmp_path / "broken")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    back = restore(tmp_path / "whole")
    assert manifest_of(back.model) == manifest_of(source)
    assert torch.equal(back.model.eval()(IMAGES), whole.model.eval()(IMAGES))
    point = make_model(TEN.training).eval()
    load_point(point, tmp_path / "whole" / "sweep" / "0.5.pt")
    assert manifest_of(point) == manifest_of(source)
    assert "manifest" in load_checkpoint(tmp_path / "whole")
