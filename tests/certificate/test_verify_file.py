"""Verification trusts neither the file nor the certificate: it measures again."""

import copy
import hashlib
import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ovit_engine.certificate import VerificationError
from ovit_engine.certificate import parity as parity_module
from ovit_engine.certificate.measure import notes_of
from ovit_engine.certificate.model import certificate_path, page_path
from ovit_engine.certificate.verify import verify_file
from ovit_engine.export.exporter import export_model
from ovit_engine.quant import bake


def rewrite(path, name, change):
    """Replace one initializer by ``change(array)``."""
    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    array = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, path)


def forge(path):
    """Make the certificate agree with the changed file in all that a text editor can."""
    certificate = path.with_name("model.certificate.json")
    content = json.loads(certificate.read_text())
    content["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    content["bytes"] = path.stat().st_size
    certificate.write_text(json.dumps(content))


def violations(path, **options):
    with pytest.raises(VerificationError) as caught:
        verify_file(path, **options)
    return "\n".join(caught.value.violations)


def test_an_honest_file_passes_and_is_measured_again(vit, convnet):
    assert verify_file(vit.path) == vit.certificate
    assert verify_file(convnet.path).integer_kernels == 4


def test_with_the_data_too(vit, digits):
    images, labels = digits
    again = verify_file(vit.path, data=[(images[900:1300], labels[900:1300])])
    assert again.parity.images == 300
    with pytest.raises(ValueError, match="none of these images"):
        verify_file(vit.path, data=[images[:200]])


def test_any_changed_byte_shows(vit_copy):
    rewrite(vit_copy.path, "blocks.0.attn.qkv.bias", lambda bias: bias + 1e-6)
    assert "sha256 differs" in violations(vit_copy.path)


def test_a_dense_weight_fails_even_with_a_forged_certificate(vit_copy):
    rewrite(vit_copy.path, "blocks.0.mlp.fc1.weight", lambda levels: np.where(levels == 0, 1, levels).astype(np.int8))
    forge(vit_copy.path)
    found = violations(vit_copy.path)
    assert "blocks.0.mlp.fc1.weight: promised 8192 zeros, the file has 0" in found
    assert "blocks.0.mlp.fc1.weight: promised 2:4, 4096 groups" in found
    assert "blocks.0.mlp.fc1.weight: the certificate says zeros" in found
    assert "sha256" not in found


def test_one_bad_group_fails(vit_copy):
    def fill(levels):
        column = levels[:4, 0]
        column[column == 0] = 1
        return levels

    rewrite(vit_copy.path, "blocks.0.attn.proj.weight", fill)
    forge(vit_copy.path)
    assert "blocks.0.attn.proj.weight: promised 2:4, 1 groups" in violations(vit_copy.path)


def test_changed_levels_of_the_same_sparsity_fail_by_parity(vit_copy):
    rewrite(vit_copy.path, "blocks.1.mlp.fc2.weight", lambda levels: -levels)
    forge(vit_copy.path)
    assert "parity" in violations(vit_copy.path)


def test_a_changed_scale_fails_by_parity(vit_copy):
    rewrite(vit_copy.path, "blocks.0.mlp.fc2.weight_scale", lambda scale: scale * 4)
    forge(vit_copy.path)
    assert "parity" in violations(vit_copy.path)


def test_a_float_weight_fails(vit_copy):
    name = "blocks.0.attn.qkv.weight"
    model = onnx.load(vit_copy.path)
    (reader,) = [node for node in model.graph.node if name in node.input]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    values = numpy_helper.to_array(tensors[name]) * numpy_helper.to_array(tensors[f"{name}_scale"])
    tensors[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
    reader.CopyFrom(onnx.helper.make_node("Identity", [name], list(reader.output)))
    onnx.save(model, vit_copy.path)
    forge(vit_copy.path)
    found = violations(vit_copy.path)
    assert f"{name}: promised int8, the file stores FLOAT" in found


def test_a_weakened_promise_in_the_metadata_differs_from_the_certificate(vit_copy):
    model = onnx.load(vit_copy.path)
    for entry in model.metadata_props:
        if entry.key == "ovit.promise":
            entry.value = '{"layers": []}'
    onnx.save(model, vit_copy.path)
    forge(vit_copy.path)
    assert "promise differs" in violations(vit_copy.path)


def test_a_recipe_that_was_edited_in_the_metadata(vit_copy):
    model = onnx.load(vit_copy.path)
    for entry in model.metadata_props:
        if entry.key == "ovit.recipe":
            entry.value = "name: other\n"
    onnx.save(model, vit_copy.path)
    assert "does not match its own hash" in violations(vit_copy.path)


def test_an_embellished_certificate(vit_copy):
    file = vit_copy.path.with_name("model.certificate.json")
    content = json.loads(file.read_text())
    content["parity"]["agreement"], content["accuracy"]["file"] = 0.5, 1.0
    content["runtime_ops"] = {"MagicKernel": 1}
    file.write_text(json.dumps(content))
    found = violations(vit_copy.path)
    assert "parity.agreement differs: the certificate says 0.5000" in found
    assert "accuracy differs" in found
    assert "the runtime chooses other kernels" in found


def test_what_is_missing_or_unreadable_is_said(vit_copy):
    certificate = vit_copy.path.with_name("model.certificate.json")
    reference = vit_copy.path.with_name("model.reference.npz")
    for file, words in ((certificate, "no certificate beside the file"), (reference, "no PyTorch reference")):
        content = file.read_bytes()
        file.unlink()
        assert words in violations(vit_copy.path)
        file.write_bytes(b"nonsense")
        assert "is not a" in violations(vit_copy.path)
        file.write_bytes(content)
    vit_copy.path.write_bytes(b"nonsense")
    assert "not a readable ONNX file, truncated: 8 of the" in violations(vit_copy.path)
    vit_copy.path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.onnx"):
        verify_file(vit_copy.path)


def test_a_file_of_somebody_else(vit_copy):
    model = onnx.load(vit_copy.path)
    del model.metadata_props[:]
    onnx.save(model, vit_copy.path)
    assert "no ovit-engine metadata" in violations(vit_copy.path)


def test_a_graph_that_the_runtime_refuses(vit_copy):
    model = onnx.load(vit_copy.path)
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, vit_copy.path)
    with pytest.raises(VerificationError, match="NoSuchOperator"):
        verify_file(vit_copy.path)


def test_images_too_large_to_store_whole(vit, digits, tmp_path, monkeypatch):
    images, labels = digits
    monkeypatch.setattr(parity_module, "STORED_BYTES", 100 * images[0].nbytes)
    path = tmp_path / "m.onnx"
    data = [(images[:300], labels[:300])]
    certificate = export_model(
        bake(copy.deepcopy(vit.model)),
        path,
        images[:2],
        promise=vit.promise,
        data=data,
        reference_model=vit.model,
    )
    assert (certificate.parity.images, certificate.parity_stored.images) == (300, 100)
    assert verify_file(path).parity_stored == certificate.parity_stored
    assert verify_file(path, data=data).parity == certificate.parity
    rewrite(path, "blocks.0.mlp.fc2.weight_scale", lambda scale: scale * 4)
    with pytest.raises(VerificationError, match="parity"):
        verify_file(path)


def test_the_labels_of_the_data_count_and_not_those_of_the_reference(vit_copy, digits):
    images, labels = (part[1000:1300] for part in digits)
    assert verify_file(vit_copy.path, data=[(images, labels)]).accuracy == vit_copy.certificate.accuracy
    wrong = labels.clone()
    wrong[:7] = (wrong[:7] + 1) % 10
    with pytest.raises(VerificationError, match="7 of 300 labels of the data are not the reference's"):
        verify_file(vit_copy.path, data=[(images, wrong)])


def test_an_edited_page_fails(vit_copy):
    page = vit_copy.path.with_name("model.certificate.html")
    page.write_text(page.read_text().replace("50.00%", "99.99%"))
    assert "model.certificate.html is not the page of its certificate" in violations(vit_copy.path)
    page.unlink()
    assert verify_file(vit_copy.path).sparsity == 0.5


def test_kernels_of_another_machine_are_told_to_be_its_own(vit_copy):
    stated = vit_copy.certificate
    other = stated.model_copy(
        update={"machine": stated.machine.model_copy(update={"cpu": "Abacus"}), "kernels": {}, "runtime_ops": {}}
    ).model_copy(update={"integer_kernels": 0})
    other = other.model_copy(update={"notes": notes_of(other, "")})
    certificate_path(vit_copy.path).write_text(other.to_json())
    page_path(vit_copy.path).unlink()
    assert "the certificate states the kernels of Abacus" in verify_file(vit_copy.path).notes[-1]
