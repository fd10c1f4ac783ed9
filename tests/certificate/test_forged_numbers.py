"""Numbers that are none, lines that follow from nothing, and what only looks measured: each is refused or told."""

import hashlib
import json
import re

import numpy as np
import onnx
import pytest

from ovit_engine.certificate.html import to_html
from ovit_engine.certificate.inconsistencies import inconsistencies
from ovit_engine.certificate.manifest import Manifest, Part
from ovit_engine.certificate.model import FORMAT, Certificate, Promise, PromisedLayer, certificate_path, page_path
from ovit_engine.certificate.parity import Reference, wilson
from ovit_engine.certificate.sparse_cores import has_2_4, matrices
from ovit_engine.certificate.strict_json import read_object
from ovit_engine.certificate.verify import differences, verify_file
from tests.certificate.test_lying_files import findings, forge, some

RIVAL = {
    "file": "dense.onnx",
    "batch_size": 1,
    "threads": 1,
    "rounds": 9,
    "median": 2e-3,
    "low": 1.9e-3,
    "high": 2.1e-3,
}
RIVAL |= {"throughput": 500.0, "baseline": None, "verdict": None}
OURS = RIVAL | {"file": "model.onnx", "median": 1e-3, "low": 0.9e-3, "high": 1.1e-3, "throughput": 1000.0}
OURS |= {"baseline": "dense.onnx", "verdict": "2.00x faster (1.90-2.10x)"}


def edit(path, change):
    content = json.loads(certificate_path(path).read_text())
    change(content)
    certificate_path(path).write_text(json.dumps(content))
    page_path(path).unlink()


def abacus(content):
    """Another machine, on which nobody can look up which kernels ran."""
    content["machine"]["cpu"] = "Abacus"


def no_kernel_is_float(content):
    abacus(content)
    content["kernels"] |= {layer["name"]: "QGemm" for layer in content["layers"]}


def many_kernels(content):
    abacus(content)
    content["runtime_ops"] = {"MatMulIntegerToFloat": 500}
    content["integer_kernels"] = 500


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["parity"].update(cosine=float("nan")), "NaN is no number of JSON"),
        (lambda c: c["parity"].update(max_error=1e999), "Infinity is no number of JSON"),
        (lambda c: c["parity"].update(images=0), "parity.images: Input should be greater than or equal to 1"),
        (lambda c: c["parity"].update(agreement=7), "parity.agreement: Input should be less than or equal to 1"),
        (lambda c: c["layers"][0].update(zeros=-1), "layers.0.zeros: Input should be greater than or equal to 0"),
        (lambda c: c.update(opset="21"), "opset: Input should be a valid integer"),
        (lambda c: c["ops"].update(Gemm=True), "ops.Gemm: Input should be a valid integer"),
        (lambda c: c["machine"].update(cores=0), "machine.cores: Input should be greater than or equal to 1"),
        (lambda c: c.update(format=FORMAT + 1), f"format {FORMAT + 1} is of a newer ovit-engine"),
        (lambda c: c["layers"].append(c["layers"][0]), "is there twice"),
        (lambda c: c["promise"]["layers"].append(c["promise"]["layers"][0]), "is there twice"),
        (lambda c: c.update(other_numbers=5), "other_numbers differs: the certificate says 5"),
        (
            lambda c: c["notes"].append("fastest file of all"),
            "a note that does not follow from the certificate: fastest",
        ),
        (no_kernel_is_float, "head.weight: an integer kernel 'QGemm' is stated for what is no int8 weight"),
        (many_kernels, "500 integer kernels can't be, of"),
    ],
)
def test_an_edited_number_is_told(vit_copy, change, words):
    edit(vit_copy.path, change)
    assert some(findings(vit_copy.path), words)


def test_true_is_not_one(vit):
    one = vit.certificate.model_copy(update={"preprocessing": {"crop": 1.0}})
    (line,) = differences(one.model_copy(update={"preprocessing": {"crop": True}}), one)
    assert line.startswith("preprocessing differs: the certificate says {'crop': True}")


def test_a_note_can_not_be_left_out(convnet, tmp_path):
    for file in convnet.path.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / convnet.path.name
    certificate = convnet.certificate
    kernels = {name: kernel for name, kernel in certificate.kernels.items() if name != "conv1.weight"}
    in_float = [layer.name for layer in certificate.quantized if layer.name not in kernels]
    assert "conv1.weight" in in_float

    def hide(content):
        abacus(content)
        content["kernels"] = kernels

    edit(path, hide)
    assert some(findings(path), "a note is missing: ", f"{len(in_float)} of 4 int8 weights are computed with in float")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([RIVAL, OURS], None),
        ([RIVAL, OURS | {"verdict": "1.60x faster (1.50-1.70x)"}], None),  # a median of ratios may differ that much
        ([RIVAL, OURS | {"verdict": "within noise (0.98-1.90x; the baseline varies by 9%)"}], None),
        (
            [RIVAL, OURS | {"verdict": "20.00x faster (19.00-21.00x)"}],
            "is not what the medians give, 2.00 times as fast",
        ),
        ([RIVAL, OURS | {"verdict": "2.00x slower (1.90-2.10x)"}], "is not what the medians give"),
        ([RIVAL, OURS | {"verdict": "2.00x faster (9.00-9.50x)"}], "is not what the medians give"),
        ([RIVAL, OURS | {"verdict": "within noise (0.98-1.02x)"}], "is not what the medians give"),
        ([RIVAL, OURS | {"verdict": "the fastest"}], "is not what the medians give"),
        ([OURS], "no row of its baseline dense.onnx"),
        ([RIVAL, OURS | {"baseline": None}], "a verdict and a baseline go together"),
        ([RIVAL | {"rounds": 0}], "latency.0.rounds: Input should be greater than or equal to 1"),
        ([RIVAL | {"throughput": float("nan")}], "NaN is no number"),
    ],
)
def test_a_verdict_follows_from_its_times(vit_copy, rows, words):
    edit(vit_copy.path, lambda content: content.update(latency=rows))
    if words is None:
        assert any("latency stays as its maker measured it" in note for note in verify_file(vit_copy.path).notes)
    else:
        assert some(findings(vit_copy.path), words)


def test_a_key_is_there_once(vit_copy):
    path = certificate_path(vit_copy.path)
    path.write_text('{"bytes": 5,' + path.read_text()[1:])
    assert some(findings(vit_copy.path), "the key 'bytes' is there twice")
    whole = vit_copy.certificate.to_json()
    text = re.sub(r'"max_error": [^\s,]+', '"max_error": 1e999', whole)
    assert text != whole
    with pytest.raises(ValueError, match="Input should be a finite number"):
        Certificate.from_json(text)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_object("[" * 100_000)
    with pytest.raises(ValueError, match="no JSON object: '5'"):
        read_object("5")


def test_parts_and_promises_are_there_once():
    part = Part(name="a", kind="units", of=4, width=1, kept=(0,))
    with pytest.raises(ValueError, match="a is there twice"):
        Manifest(parts=(part, part))
    with pytest.raises(ValueError, match=r"a\.weight is there twice"):
        Promise(layers=(PromisedLayer(name="a.weight", zeros=1), PromisedLayer(name="a.weight")))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("ovit.shared_weights", "null", "no JSON object: 'null'"),
        ("ovit.shared_weights", '{"head.weight": 5}', "head.weight is shared with 5, which is no name"),
        ("ovit.shared_weights", '{"decoy": "head.weight"}', "decoy: named as shared, and not promised"),
        ("ovit.preprocessing", '{"size": NaN}', "NaN is no number of JSON"),
        ("ovit.promise", '{"layers": [], "layers": []}', "the key 'layers' is there twice"),
        (
            "ovit.promise",
            '{"layers": [{"name": "a", "zeros": true}]}',
            "layers.0.zeros: Input should be a valid integer",
        ),
        (
            "ovit.recipe",
            "modifiers: [{magnitude_prune: {targets: ['re:(']}}]",
            "the recipe in the metadata is no recipe",
        ),
    ],
)
def test_metadata_of_another_kind_is_told(vit_copy, key, value, words):
    model = onnx.load(vit_copy.path)
    found = {entry.key: entry for entry in model.metadata_props}
    found[key].value = value
    found["ovit.recipe_sha256"].value = hashlib.sha256(found["ovit.recipe"].value.encode()).hexdigest()
    onnx.save(model, vit_copy.path)
    lines = findings(vit_copy.path)
    assert some(lines, words)
    assert all("\n" not in line for line in lines)


def test_the_manifest_is_fingerprinted(vit_copy):
    model = onnx.load(vit_copy.path)
    part = Part(name="blocks.9.mlp", kind="units", of=10**6, width=1, kept=(0,))
    next(e for e in model.metadata_props if e.key == "ovit.manifest").value = Manifest(parts=(part,)).model_dump_json()
    onnx.save(model, vit_copy.path)
    forge(vit_copy.path)
    assert some(findings(vit_copy.path), "ovit.manifest: it was changed since the file was written")


def test_a_weight_stored_once_counts_once(vit_copy):
    """A promise of many names for one sparse tensor would make any file sparse."""
    whole = vit_copy.certificate
    twin = whole.layers[0].model_copy(update={"name": "twin.weight", "shared_with": whole.layers[0].name})
    layers = (*whole.promise.layers, PromisedLayer(name="twin.weight", zeros=twin.zeros))
    more = whole.model_copy(
        update={"layers": (*whole.layers, twin), "promise": whole.promise.model_copy(update={"layers": layers})}
    )
    for name in ("sparsity", "total_sparsity", "int8_share"):
        assert getattr(more, name) == getattr(whole, name)


def test_a_page_of_an_older_certificate_is_told_not_to_be_checked(vit_copy):
    content = json.loads(certificate_path(vit_copy.path).read_text())
    content["format"] = 3
    del content["other_numbers"]
    certificate_path(vit_copy.path).write_text(json.dumps(content))
    page_path(vit_copy.path).write_text("as it was written then")
    assert "model.certificate.html was made by an older ovit-engine" in verify_file(vit_copy.path).notes[-1]
    assert "numbers besides" not in to_html(Certificate.from_json(json.dumps(content)))


def test_stored_images_bound_what_is_said_of_all(vit_copy):
    """300 images of which 100 are stored: where 90 of those agree, 290 of all do at the most."""

    def of(images, agreement):
        low, high = wilson(agreement, images)
        update = {"images": images, "agreement": agreement, "agreement_low": low, "agreement_high": high}
        return vit_copy.certificate.parity.model_copy(update=update)

    reference = Reference.load(vit_copy.path.with_name("model.reference.npz"))
    for agreement, fits in ((290 / 300, True), (299 / 300, False), (90 / 300, True), (80 / 300, False)):
        parts = {"parity": of(300, agreement), "parity_stored": of(100, 0.9)}
        lines = inconsistencies(vit_copy.certificate.model_copy(update=parts), reference)
        assert some(lines, "images can't agree where 90.00% of the 100 stored ones do") != fits


def test_arrays_of_the_reference_have_no_other_type(vit_copy):
    path = vit_copy.path.with_name("model.reference.npz")
    parts = dict(np.load(path))
    for key, array in (
        ("logits", parts["logits"].astype(str)),
        ("logits", parts["logits"][:, 0]),
        ("labels", parts["labels"].astype(float)),
        ("hashes", parts["hashes"].astype(str)),
        ("input_0", np.float32(3)),
        ("prints", parts["prints"].astype(str)),
        ("tensor:head.bias", np.array("text")),
    ):
        np.savez_compressed(path, **{**parts, key: array})
        assert some(findings(vit_copy.path), "model.reference.npz was changed"), key


def test_a_layer_that_a_pruner_left_dense_counts_in_the_sparsity(vit_copy):
    """Erdős–Rényi-Kernel leaves small layers whole: the share of zeros is of all that it was given."""
    whole = vit_copy.certificate
    head = next(layer for layer in whole.layers if layer.name == "head.weight")
    promise = whole.promise.model_copy(
        update={"layers": (*whole.promise.layers, PromisedLayer(name="head.weight", pruned=True))}
    )
    more = whole.model_copy(update={"promise": promise})
    zeros, numel = (sum(getattr(layer, key) for layer in whole.pruned) for key in ("zeros", "numel"))
    assert more.sparsity == (zeros + head.zeros) / (numel + head.numel) < whole.sparsity
    assert len(more.pruned) == len(whole.pruned) + 1


def test_the_table_of_2_4_is_of_the_weights_that_are_promised_it(vit_copy):
    whole = vit_copy.certificate
    first, *others = whole.promise.layers
    loose = whole.promise.model_copy(update={"layers": (first.model_copy(update={"pattern": "unstructured"}), *others)})
    names = [layer.name for layer in matrices(whole.model_copy(update={"promise": loose}))]
    assert sorted([*names, first.name]) == sorted(layer.name for layer in matrices(whole))
    none = tuple(layer.model_copy(update={"pattern": "unstructured"}) for layer in whole.promise.layers)
    assert not has_2_4(whole.model_copy(update={"promise": Promise(layers=none)}))
