"""Files of models that lost heads and units: smaller, without a trace of gates, and honest about what went."""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from ovit_engine import Engine, Recipe, Run
from ovit_engine.certificate import ExportError
from ovit_engine.certificate.manifest import Manifest
from ovit_engine.certificate.measure import Provenance
from ovit_engine.certificate.model import PromisedLayer, reference_path
from ovit_engine.certificate.parity import Reference, random_sample
from ovit_engine.certificate.render import fact_rows
from ovit_engine.certificate.verify import verify_file
from ovit_engine.core.capabilities import Deployable, Scheduled, Surgical
from ovit_engine.core.schedule import Clock
from ovit_engine.export.deploy import smaller
from ovit_engine.export.exporter import publish
from ovit_engine.export.writer import build_onnx, set_metadata
from ovit_engine.structured.gates import find_sites, install, installed, set_gate
from ovit_engine.structured.shrink_model import rebuild
from tests.certificate.test_without_torch import run_blocked
from tests.exported_files import findings, table_of
from tests.structured.shrinking import HEADS_KEPT, IMAGES, UNITS_KEPT, vit

PRUNE = "magnitude_prune: {sparsity: 0.5, targets: ['re:blocks.*(qkv|proj|fc1|fc2).weight']}"
TWO_OF_FOUR = "magnitude_prune: {pattern: '2:4', targets: ['re:blocks.*(qkv|proj|fc1|fc2).weight']}"
QUANTIZE = "quantize: {start: 1st, freeze_observers: 4st}"
SHRINK = "shrink: {}"


class Closing(Scheduled, Surgical, Deployable):
    """Gates that close at step 3."""

    name = "closing"
    removes_units = True

    def prepare(self, run: Run) -> None:
        install(find_sites(run.model))

    def step_end(self, run: Run) -> None:
        lists = {"heads": list(HEADS_KEPT), "units": list(UNITS_KEPT)}
        for site in installed(run.model) if run.step == 3 else ():
            set_gate(site, torch.isin(torch.arange(site.count), torch.tensor(lists[site.kind].pop(0))))

    def timeline(self, clock: Clock) -> Iterable[tuple[int, str, str]]:
        return ()


def trained(*lines: str, gates: bool = False) -> Engine:
    model = vit()
    recipe = Recipe.parse("\n  - ".join(["modifiers:", *lines]) if lines else "modifiers: []")
    recipe = Recipe("small", (*recipe.modifiers, *([Closing()] if gates else [])))
    engine = Engine(model, recipe, steps_per_epoch=6, epochs=1).prepare()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    engine.attach(optimizer)
    model.train()
    for _ in range(6):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
    engine.detach()
    return engine


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: Any) -> Any:
    """Gates, 2:4 and int8 in one file."""
    folder = tmp_path_factory.mktemp("stacked")
    engine = trained(TWO_OF_FOUR, QUANTIZE, gates=True)
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    certificate = engine.export(folder / "model.onnx", IMAGES[:1])
    for name, value in engine.model.state_dict().items():
        assert torch.equal(value, before[name]), name  # training may go on
    assert engine.run.masks.get("blocks.0.attn.qkv.weight").shape == (96, 32)
    return folder / "model.onnx", certificate, engine


def test_a_stacked_file_is_small_and_keeps_its_patterns(stacked: Any) -> None:
    path, certificate, engine = stacked
    facts = {layer.name: layer for layer in certificate.layers}
    assert facts["blocks.0.attn.qkv.weight"].shape == (3 * 3 * 8, 32)
    assert facts["blocks.1.attn.proj.weight"].shape == (32, 8)
    assert facts["blocks.1.mlp.fc1.weight"].shape == (16, 32)  # five units, in whole groups of four
    assert all(facts[layer.name].broken_groups == 0 for layer in certificate.promise.layers)
    assert all(facts[layer.name].quantized for layer in certificate.promise.layers)
    removed = {layer.name: layer.removed for layer in certificate.promise.layers}
    assert removed["blocks.0.attn.qkv.weight"] == 8 * 3 * 32
    assert removed["blocks.1.mlp.fc2.weight"] == (64 - 16) * 32
    gated = engine.model.eval()
    small = copy.deepcopy(gated)
    smaller(small, engine.run.masks, dead=False)
    assert (small(IMAGES) - gated(IMAGES)).abs().max() < 1e-5
    assert re.search(r"removed +4 of 8 heads, 80 of 128 units are left, as the run said", table_of(certificate))
    assert "left as dead" not in table_of(certificate)  # what gates removed is no zero
    assert {layer.dead for layer in certificate.promise.layers} == {0}
    assert verify_file(path).manifest == certificate.manifest


def test_it_is_verified_without_torch(stacked: Any) -> None:
    result = run_blocked("verify", stacked[0])
    assert result.returncode == 0, result.stderr
    assert "4 of 8 heads" in result.stdout


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: Any) -> Any:
    """Gates in float, and units that pruning left dead."""
    path = tmp_path_factory.mktemp("harvested") / "model.onnx"
    engine = trained(PRUNE, SHRINK, gates=True)
    masks, name = engine.run.masks, "blocks.0.mlp.fc1.weight"
    mask = masks.get(name).clone()
    mask[10:40] = False
    masks.set(masks._slots[name], mask)
    return path, engine.export(path, IMAGES[:1]), engine


def test_the_graph_is_that_of_a_plain_small_model(harvested: Any) -> None:
    """Nothing multiplies by gates: operators and initializers are those of the rebuilt model."""
    path, certificate, engine = harvested
    written = onnx.load(path)
    found = {entry.key: entry.value for entry in written.metadata_props}
    manifest = Manifest.model_validate_json(found["ovit.manifest"])
    plain, _, _ = build_onnx(rebuild(vit(), manifest), IMAGES[:1])
    ops = [Counter(node.op_type for node in proto.graph.node) for proto in (written, plain)]
    assert ops[0] == ops[1]
    assert not {"Where", "And", "Not"} & set(ops[0])
    sizes = [sorted(tuple(tensor.dims) for tensor in proto.graph.initializer) for proto in (written, plain)]
    assert sizes[0] == sizes[1]
    stored = sum(math.prod(shape) for shape in sizes[0])
    assert stored < 0.6 * sum(parameter.numel() for parameter in engine.model.parameters())
    assert certificate.manifest == manifest
    assert certificate.parity.max_error < 1e-5


def test_the_recipe_line_removes_what_pruning_left_dead(harvested: Any) -> None:
    path, certificate, engine = harvested
    gone = [unit for unit in UNITS_KEPT[0] if 10 <= unit < 40]
    kept = {part.name: list(part.kept) for part in certificate.manifest.parts}
    assert kept["blocks.0.mlp"] == [unit for unit in UNITS_KEPT[0] if unit not in gone]
    assert kept["blocks.1.mlp"] == UNITS_KEPT[1]
    facts = {layer.name: layer for layer in certificate.layers}
    promised = {layer.name: layer for layer in verify_file(path).promise.layers}
    left = [unit for unit in UNITS_KEPT[0] if unit not in gone]
    for name, axis in (("blocks.0.mlp.fc1.weight", 0), ("blocks.0.mlp.fc2.weight", 1)):
        mask = engine.run.masks.get(name).index_select(axis, torch.tensor(left))
        assert facts[name].shape == tuple(mask.shape)
        assert promised[name].zeros == int((~mask).sum())
        assert promised[name].removed == (64 - len(left)) * 32
        assert promised[name].dead == len(gone) * 32
    wanted = sum(layer.zeros + layer.dead for layer in promised.values()) / sum(
        facts[name].numel + layer.dead for name, layer in promised.items()
    )
    assert certificate.sparsity_with_dead == pytest.approx(wanted)
    assert certificate.sparsity_with_dead > certificate.sparsity
    text = " ".join(table_of(certificate).split())
    assert f"weights that are said to have left as dead, {wanted:.2%} of the pruned ones are zero" in text
    kept_dead = smaller(copy.deepcopy(engine.model), engine.run.masks, dead=False)
    assert {layer.name: layer.removed for layer in kept_dead.layers}[name] == 32 * 32


def test_what_left_counts_in_no_figure_but_its_own(harvested: Any) -> None:
    certificate = harvested[1]
    promise = certificate.promise
    layers = tuple(layer.model_copy(update={"removed": 9**9, "dead": 9**9}) for layer in promise.layers)
    other = certificate.model_copy(update={"promise": promise.model_copy(update={"layers": layers})})
    assert other.sparsity_with_dead > 0.99
    assert (other.sparsity, other.total_sparsity) == (certificate.sparsity, certificate.total_sparsity)
    facts = dict(fact_rows(other))
    assert facts["sparsity"] == dict(fact_rows(certificate))["sparsity"]
    assert facts["removed"].startswith(f"{certificate.manifest} are left, as the run said: a file can't show")
    assert not [name for name, text in facts.items() if f"{other.dead:,}" in text and name != "removed"]


def test_a_line_that_can_do_nothing_is_refused() -> None:
    recipe = Recipe.parse("modifiers:\n  - shrink: {}\n", file="r.yaml")
    with pytest.raises(ValueError, match=r"r\.yaml:2:5: shrink: Sequential has no heads to gate"):
        Engine(nn.Sequential(nn.Linear(2, 2)), recipe, steps_per_epoch=1, epochs=1).prepare()


def change_manifest(path: Any, edit: Any) -> None:
    model = onnx.load(path)
    found = {entry.key: entry.value for entry in model.metadata_props}
    manifest = json.loads(found["ovit.manifest"])
    edit(manifest)
    found["ovit.manifest"] = json.dumps(manifest)
    set_metadata(model, found)
    onnx.save(model, path)


def copied(stacked: Any, folder: Any) -> Any:
    for file in stacked[0].parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m["parts"].clear(), "manifest differs: the certificate says"),
        (
            lambda m: m["parts"][0].update(kept=[0, 1]),
            "blocks.0.attn.qkv.weight is [72, 32], the manifest keeps 2",
        ),
        (lambda m: m["parts"][0].update(kept=[3, 1]), "broken ovit-engine metadata"),
    ],
)
def test_a_changed_manifest_is_found(stacked: Any, tmp_path: Any, edit: Any, words: str) -> None:
    path = copied(stacked, tmp_path)
    change_manifest(path, edit)
    assert any(line.startswith(words) for line in findings(path))


def test_dead_weights_are_part_of_the_removed() -> None:
    with pytest.raises(ValueError, match=r"a.weight: 6 dead weights are more than the 5 removed ones"):
        PromisedLayer(name="a.weight", removed=5, dead=6)


def test_a_file_whose_shapes_are_not_the_manifest_is_not_written(stacked: Any, tmp_path: Any) -> None:
    path, certificate, _ = stacked
    proto, reference = onnx.load(path), Reference.load(reference_path(path))
    wrong = Manifest(parts=(certificate.manifest.parts[0].model_copy(update={"kept": (0,)}),))
    sample = random_sample([IMAGES[:1].shape], ["float32"])
    with pytest.raises(ExportError, match="the manifest keeps 1 heads"):
        publish(proto, tmp_path / "model.onnx", replace(Provenance.read(proto), manifest=wrong), sample, reference)
    assert not list(tmp_path.iterdir())
