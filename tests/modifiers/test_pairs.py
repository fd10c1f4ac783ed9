"""Any two modifiers in one recipe: three steps with both at work, and a copy for deployment; or a reason why not.

Real ONNX files are written of a pair of each two families that change the graph or what a file promises: writing one
takes as long as training twenty pairs.
"""

import warnings
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import ovit_engine.export.deploy
from ovit_engine import Calibration, Engine, RecipeError
from ovit_engine.core.registry import modifiers
from ovit_engine.quant.prepare import quantizers
from ovit_engine.structured.gates import installed, live_mask
from ovit_engine.tokens import hooks_of
from tests.loops import recipe

IMAGES = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 4
CALIBRATION = Calibration(torch.utils.data.TensorDataset(IMAGES, LABELS), nn.functional.cross_entropy)
STEPS = 5  # gates at the first, weights at the second, int8 from the third on
GRADIENTS = "gradients: 4, images_per_gradient: 4"

# family and options; WEIGHTS are fc1 for the first of a pair and fc2 for the second
SETTINGS = {
    "acdc": ("phases", "{every: 1st, start: 1st, last_sparse: 1st, sparsity: 0.5, targets: WEIGHTS}"),
    "constant_mask": ("masks", "{targets: [head.weight]}"),
    "magnitude_prune": ("masks", "{start: 2st, sparsity: 0.5, targets: WEIGHTS}"),
    "ovit_prune": ("masks", f"{{start: 2st, sparsity: 0.5, targets: WEIGHTS, block: 16, {GRADIENTS}}}"),
    "obert_prune": ("masks", f"{{start: 2st, sparsity: 0.5, targets: WEIGHTS, block: 16, {GRADIENTS}}}"),
    "mfac_prune": ("masks", f"{{start: 2st, sparsity: 0.5, targets: WEIGHTS, block: 32, {GRADIENTS}}}"),
    "obd_prune": ("masks", f"{{start: 2st, sparsity: 0.5, targets: WEIGHTS, {GRADIENTS}}}"),
    "grad_weight_prune": ("masks", f"{{start: 2st, sparsity: 0.5, targets: WEIGHTS, {GRADIENTS}}}"),
    "movement_prune": ("masks", "{start: 2st, sparsity: 0.5, targets: WEIGHTS}"),
    "svite": ("topology", "{every: 1st, end: 2st, sparsity: 0.5, targets: WEIGHTS}"),
    "s2vite": ("gates", "{head_sparsity: 0.5, unit_sparsity: 0.25, every: 1st, end: 2st}"),
    "structured_prune": ("gates", "{start: 1st, gradients: 1, head_sparsity: 0.5, unit_sparsity: 0.25}"),
    "gohsp": ("gates", "{end: 1st, every: 1st, parameter_sparsity: 0.3, rank: {images: 16}}"),
    "shrink": ("shrink", "{}"),
    "dynamic_vit": ("tokens", "{keep: 0.5, blocks: [1]}"),
    "svite_tokens": ("tokens", "{keep: 0.75}"),
    "evit": ("tokens", "{keep: 0.5, blocks: [0]}"),
    "tome": ("tokens", "{r: 1}"),
    "cyclic_lr": ("rate", "{max: 0.1, min: 0.01, period: 2st}"),
    "distill": ("loss", "{logits: 1, tokens: 1}"),
    "quantize": ("int8", "{start: 3st, freeze_observers: 4st}"),
}
IN_FILES = {"masks", "gates", "tokens", "int8"}
NAMES = sorted(modifiers())
PAIRS = list(combinations_with_replacement(NAMES, 2))

GATES_FIRST = (
    "the gate of .* does not go with .*: sparsity is a share of the weights that gates leave, so gates come fi"
)
ONE_WRITER = "writes {} from step .*, where {} .* writes it from"
# by family: what two of them at once are refused with
REFUSED = {
    ("gates", "phases"): GATES_FIRST,
    ("gates", "topology"): GATES_FIRST,
    ("gates", "gates"): "writes the gate of blocks.0.*|has gates already",
    ("tokens", "tokens"): "the model's tokens are reduced already, by ",
    ("rate", "rate"): ONE_WRITER.format("the learning rate", "cyclic_lr"),
    ("int8", "int8"): "quantize",
}


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)
    with torch.no_grad():
        model.head.weight[:, ::2] = 0.0  # for constant_mask
    return model


def line(name: str, layer: str) -> str:
    return (
        f"{name}: {SETTINGS[name][1].replace('WEIGHTS', f'[blocks.0.mlp.{layer}.weight, blocks.1.mlp.{layer}.weight]')}"
    )


def families(pair: tuple[str, str]) -> tuple[str, str]:
    one, two = sorted(SETTINGS[name][0] for name in pair)
    return one, two


def engine_for(pair: tuple[str, str], model: nn.Module, *, layers: tuple[str, str] = ("fc1", "fc2")) -> Engine:
    lines = [line(name, layer) for name, layer in zip(pair, layers, strict=True)]
    if layers == ("fc1", "fc1"):  # a topology that is still may be pruned further
        lines = [text.replace("end: 2st", "end: 4st") for text in lines]
    return Engine(model, recipe(*lines), steps_per_epoch=STEPS, epochs=1)


def trained(pair: tuple[str, str]) -> tuple[Engine, Any]:
    model = vit()
    engine = engine_for(pair, model).prepare()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*every gradient takes all of them")
        engine.attach(optimizer, calibration=CALIBRATION)
    for _ in range(STEPS):
        optimizer.zero_grad()
        engine.loss(nn.functional.cross_entropy(model(IMAGES), LABELS)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        check_masks(engine)
    engine.detach()
    return engine, model


def check_masks(engine: Engine) -> None:
    weights = dict(engine.model.named_parameters())
    for name in engine.run.masks.names():
        mask = engine.run.masks.get(name)
        assert mask is not None
        assert not weights[name][~mask].any(), name


def check_parts(pair: tuple[str, str], engine: Engine, model: nn.Module) -> None:
    """What each of the two leaves behind is there, whatever the other did."""
    kinds = {SETTINGS[name][0] for name in pair}
    masks, weights = engine.run.masks, dict(model.named_parameters())
    assert bool(masks.names()) == bool(kinds & {"masks", "phases", "topology"})
    live = live_mask(model)
    assert bool(installed(model)) == ("gates" in kinds)
    for site in installed(model):
        assert 0 < int(site.gate.sum()) < site.count or "gohsp" in pair, site.name
    targets = [name for name in masks.names() if ".mlp." in name]
    for layer in ("fc1", "fc2"):  # one prunes each, to one half of what gates leave
        names = [name for name in targets if layer in name]
        total = sum(int(live[n].sum()) if n in live else weights[n].numel() for n in names)
        kept = sum(int((masks.get(n) & live[n]).sum()) if n in live else int(masks.get(n).sum()) for n in names)  # type: ignore[operator,union-attr]
        assert abs(kept - total / 2) <= 0.5, layer
    assert (hooks_of(model) is not None) == ("tokens" in kinds)
    enabled = [bool(quantizer.enabled) for _, quantizer in quantizers(model)]
    assert any(enabled) == ("int8" in kinds)


@pytest.mark.parametrize("name", NAMES)
def test_each_has_settings_here(name: str) -> None:
    assert name in SETTINGS, "give it a line in SETTINGS: a family, and options with which it acts within five steps"


@pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)
def test_two_train_together_and_are_deployed_or_refused(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    if (message := refusal(pair)) is not None:
        with pytest.raises((RecipeError, RuntimeError), match=message):
            engine_for(pair, vit()).prepare()
        return
    engine, model = trained(pair)
    check_parts(pair, engine, model)
    model.eval()
    with torch.no_grad():
        before = model(IMAGES)
    assert before.shape == (16, 4)
    assert before.isfinite().all()
    baked: list[tuple[nn.Module, Any]] = []
    monkeypatch.setattr(
        ovit_engine.export.deploy, "export_model", lambda made, *_, promise, **__: baked.append((made, promise))
    )
    engine.export("never written", IMAGES[:1])
    ((made, promise),) = baked
    with torch.no_grad():
        after = made(IMAGES)
    assert torch.allclose(after, before, atol=1e-4), float((after - before).abs().max())
    check_promise(made, promise)
    kinds = {SETTINGS[name][0] for name in pair}
    assert {layer.quantized for layer in promise.layers} >= ({True} if "int8" in kinds else set())


def check_promise(made: nn.Module, promise: Any) -> None:
    weights: dict[str, Tensor] = dict(made.state_dict())
    for layer in promise.layers:
        weight = weights.get(layer.name)
        if weight is None:  # integers by another name: the file is measured where one is written
            assert layer.quantized, layer.name
            continue
        assert int((weight == 0).sum()) >= layer.zeros, layer.name


def refusal(pair: tuple[str, str]) -> str | None:
    """The message that a pair is refused with, None where the two go together."""
    first, second = pair
    if first == second == "constant_mask":
        return "writes the mask of head.weight"
    return REFUSED.get(families(pair))


@pytest.mark.parametrize(
    "pair",
    [p for p in PAIRS if {SETTINGS[n][0] for n in p} <= {"masks", "phases", "topology"} and "constant_mask" not in p],
    ids=" + ".join,
)
def test_two_that_mask_one_weight_are_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(RecipeError, match=r"writes the mask of blocks.0.mlp.fc1.weight from step .* writes it from"):
        engine_for(pair, vit(), layers=("fc1", "fc1")).prepare()


def test_two_prune_behind_one_gate() -> None:
    """Both need it to be still, and neither writes it."""
    three = recipe(line("structured_prune", ""), line("magnitude_prune", "fc1"), line("magnitude_prune", "fc2"))
    engine = Engine(vit(), three, steps_per_epoch=STEPS, epochs=1).prepare()
    assert [m.name for m in engine.modifiers] == ["structured_prune", "magnitude_prune", "magnitude_prune"]


def test_what_needs_a_topology_to_be_still_says_so() -> None:
    late = recipe(line("magnitude_prune", "fc1"), "structured_prune: {start: 3st, gradients: 1, unit_sparsity: 0.25}")
    with pytest.raises(RecipeError, match="r.yaml:3:5: structured_prune: " + GATES_FIRST):
        Engine(vit(), late, steps_per_epoch=STEPS, epochs=1).prepare()
    scoped = recipe(line("magnitude_prune", "fc1")[:-1] + ", scope: layer}", line("structured_prune", "fc1"))
    with pytest.raises(
        RecipeError, match=r"magnitude_prune.scope: the gate of blocks.0.mlp.fc2 leaves some weights of"
    ):
        Engine(vit(), scoped, steps_per_epoch=STEPS, epochs=1).prepare()


def representatives() -> list[tuple[str, str]]:
    """One pair of each two families that go together and change the file."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for pair in PAIRS:
        one, two = families(pair)
        if refusal(pair) is None and one != two and {one, two} <= IN_FILES and "constant_mask" not in pair:
            found.setdefault((one, two), pair)
    return list(found.values())


@pytest.mark.parametrize("pair", representatives(), ids=" + ".join)
def test_the_file_of_two_families_keeps_its_promise(pair: tuple[str, str], tmp_path: Path) -> None:
    engine, _ = trained(pair)
    engine.export(tmp_path / "pair.onnx", IMAGES[:1])  # raises where it does not
    assert (tmp_path / "pair.onnx").is_file()
