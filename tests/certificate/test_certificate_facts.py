"""What follows from the facts of a certificate: totals, tables, names that occur once."""

import pytest

from ovit_engine.certificate.manifest import Manifest, Part
from ovit_engine.certificate.model import Promise, PromisedLayer
from ovit_engine.certificate.notes import Note
from ovit_engine.certificate.sparse_cores import has_2_4, matrices


def test_parts_and_promises_are_there_once():
    part = Part(name="a", kind="units", of=4, width=1, kept=(0,))
    with pytest.raises(ValueError, match="a occurs twice"):
        Manifest(parts=(part, part))
    with pytest.raises(ValueError, match=r"a\.weight occurs twice"):
        Promise(layers=(PromisedLayer(name="a.weight", zeros=1), PromisedLayer(name="a.weight")))


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


def test_the_summary_of_a_certificate(vit):
    certificate = vit.certificate
    first, second, third, fourth, *_ = str(certificate).splitlines()
    assert first == f"model.onnx: {certificate.bytes:,} bytes, {certificate.gzip_bytes:,} by gzip"
    assert second.startswith(f"{certificate.sparsity:.2%} zeros in pruned weights, ")
    assert second.endswith("int8 in 8 layers, 8 integer kernels")
    assert third == f"{certificate.parity.agreement:.2%} of 300 images agree with PyTorch"
    assert fourth == f"{certificate.accuracy.file:.2%} top-1, PyTorch {certificate.accuracy.pytorch:.2%}"


def test_notes_render_their_numbers():
    note = Note(code="float_kernels", count=4, total=9, names=("a", "b", "c", "d"))
    assert str(note) == "ONNX Runtime computes 4 of 9 int8 weights in float: a, b, c, ..."
    assert str(Note(code="first_output", total=2, names=("y",))) == "parity compares 'y', the first of 2 outputs"
    assert str(Note(code="few_images", count=40, total=256)).startswith(
        "parity was measured on all 40 images given; 256"
    )
