"""Verification measures a file again and names what differs from the certificate."""

import copy
import hashlib
import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from ovit_engine.certificate import VerificationError
from ovit_engine.certificate import parity as parity_module
from ovit_engine.certificate.model import FORMAT, certificate_path, reference_path
from ovit_engine.certificate.verify import _beyond_the_part, certificate_differences, verify_file
from ovit_engine.cli import main
from ovit_engine.export.exporter import export_model
from ovit_engine.quant import bake
from tests.exported_files import findings


def rewrite(path, name, change):
    """Replace one initializer by ``change(array)``."""
    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    array = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, path)


def forge(path):
    """Make the certificate agree with the changed file in its hash and size."""
    certificate = path.with_name("model.certificate.json")
    content = json.loads(certificate.read_text())
    content["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    content["bytes"] = path.stat().st_size
    certificate.write_text(json.dumps(content))


def violations(path, **options):
    return "\n".join(findings(path, **options))


def edit_metadata(path, key, value):
    model = onnx.load(path)
    next(entry for entry in model.metadata_props if entry.key == key).value = value
    onnx.save(model, path)


def edit_certificate(path, change):
    content = json.loads(certificate_path(path).read_text())
    change(content)
    certificate_path(path).write_text(json.dumps(content))


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


def test_one_wrong_level_is_named(vit_copy):
    def nudge(levels):
        row, column = np.argwhere((levels > 1) & (levels < 100))[0]
        levels[row, column] += 1
        return levels

    rewrite(vit_copy.path, "blocks.1.mlp.fc2.weight", nudge)
    lines = findings(vit_copy.path)
    assert "blocks.1.mlp.fc2.weight: differs from PyTorch's tensor" in lines
    assert any(line.startswith("sha256 differs: the certificate says ") for line in lines)


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc2.weight_scale", "blocks.1.attn.qkv.input.scale"])
def test_a_slightly_changed_scale_is_named(vit_copy, name):
    rewrite(vit_copy.path, name, lambda scale: (scale * 1.02).astype(np.float32))
    lines = findings(vit_copy.path)
    assert f"{name}: differs from PyTorch's tensor" in lines
    assert any(line.startswith("sha256 differs") for line in lines)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("ovit.promise", '{"layers": []}', "promise differs"),
        ("ovit.recipe", "name: other\n", "recipe_sha256 differs: the certificate says"),
        ("ovit.preprocessing", '{"mean": [9]}', "preprocessing differs"),
        ("ovit.preprocessing", "null", "broken ovit-engine metadata: Input should be an object"),
        ("ovit.shared_weights", '{"head.weight": 5}', "broken ovit-engine metadata: head.weight: Input should be a"),
        ("ovit.promise", '{"layers": [{"name": "a", "zeros": true}]}', "layers.0.zeros: Input should be a valid int"),
        ("ovit.promise", '{"layers": [], "layers": []}', "broken ovit-engine metadata: layers occurs twice"),
        ("ovit.preprocessing", "[" * 100_000, "broken ovit-engine metadata: nested too deeply"),
        ("ovit.format", "1", "the file's metadata have format 1, this ovit-engine reads format 2: export the file a"),
    ],
)
def test_changed_metadata_fail(vit_copy, key, value, words):
    edit_metadata(vit_copy.path, key, value)
    forge(vit_copy.path)
    lines = findings(vit_copy.path)
    assert any(words in line for line in lines), lines
    assert not any("\n" in line for line in lines)


def test_an_embellished_certificate(vit_copy):
    def embellish(content):
        content["parity"]["agreement"], content["accuracy"]["file"] = 0.5, 1.0
        content["runtime_ops"] = {"MagicKernel": 1}

    edit_certificate(vit_copy.path, embellish)
    found = violations(vit_copy.path)
    assert "parity.agreement differs: the certificate says 0.5000" in found
    assert "accuracy differs" in found
    assert "the runtime chooses other kernels" in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(gzip_bytes=10), "gzip_bytes differs: the certificate says 10"),
        (lambda c: c.update(other_numbers=5), "other_numbers differs: the certificate says 5"),
        (lambda c: c.update(macs=5), "macs differs: the certificate says 5"),
        (lambda c: c.update(integer_kernels=99), "integer_kernels: Extra inputs are not permitted"),
        (lambda c: c["runtime_ops"].update(MatMulIntegerToFloat=99), "the runtime chooses other kernels than the cert"),
        (
            lambda c: c["accuracy"].update(pytorch=0.999),
            "accuracy of PyTorch differs: the certificate says (300, 0.999",
        ),
        (lambda c: c["accuracy"].update(images=50_000), "accuracy of PyTorch differs: the certificate says (50000, "),
        (lambda c: c.update(accuracy=None), "accuracy of PyTorch differs: the certificate says None"),
        (lambda c: c["parity"].update(images=50_000), "parity differs: the certificate speaks of 50000 images"),
        (lambda c: c["parity"].update(source="random"), "parity differs: the certificate speaks of 300 images"),
        (lambda c: c["parity"].update(agreement_low=0.9999), "parity.agreement_low differs"),
        (lambda c: c["layers"].pop(), "in the file, not in the certificate"),
        (lambda c: c["parity"].update(images=0), "parity.images: Input should be greater than or equal to 1"),
        (lambda c: c["parity"].update(cosine=float("nan")), "parity.cosine: Input should be a finite number"),
        (lambda c: c["layers"][0].update(zeros=-1), "layers.0.zeros: Input should be greater than or equal to 0"),
        (lambda c: c.update(opset="21"), "opset: Input should be a valid integer"),
        (lambda c: c["layers"].append(c["layers"][0]), "occurs twice"),
    ],
)
def test_an_edited_certificate_fails(vit_copy, change, words):
    edit_certificate(vit_copy.path, change)
    assert words in violations(vit_copy.path)


def test_a_key_is_there_once(vit_copy):
    path = certificate_path(vit_copy.path)
    text = path.read_text()
    path.write_text('{"bytes": 5,' + text[1:])
    assert findings(vit_copy.path) == ("model.certificate.json can't be read: bytes occurs twice",)
    path.write_text(text.replace('"parity": {', '"parity": {"images": 9999,'))
    assert findings(vit_copy.path) == ("model.certificate.json can't be read: images occurs twice",)


@pytest.mark.parametrize("number", [1, FORMAT - 1, FORMAT + 1])
def test_a_certificate_of_another_format_is_refused_in_one_line(vit_copy, number):
    edit_certificate(vit_copy.path, lambda content: content.update(format=number))
    assert findings(vit_copy.path) == (
        f"model.certificate.json can't be read: it has format {number}, this ovit-engine reads format {FORMAT}: "
        "export the file again",
    )


def test_true_is_not_one(vit):
    one = vit.certificate.model_copy(update={"preprocessing": {"crop": 1.0}})
    (line,) = certificate_differences(one.model_copy(update={"preprocessing": {"crop": True}}), one)
    assert line.startswith("preprocessing differs: the certificate says {'crop': True}")


def edit_reference(path, key, change):
    parts = dict(np.load(reference_path(path)))
    np.savez_compressed(reference_path(path), **{**parts, key: change(parts[key])})


def rehash_reference(path):
    """Make the certificate name the reference as it is."""
    digest = hashlib.sha256(reference_path(path).read_bytes()).hexdigest()
    edit_certificate(path, lambda content: content.update(reference_sha256=digest))


@pytest.mark.parametrize("key", ["input_0", "labels", "hashes", "logits", "tensor:head.bias"])
def test_a_changed_reference_fails(vit_copy, key):
    edit_reference(vit_copy.path, key, lambda array: array + array.dtype.type(1))
    (line,) = findings(vit_copy.path)
    assert line.startswith("model.reference.npz: reference_sha256 differs: the certificate says ")


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("input_0", lambda array: array[:1], "do not belong together"),
        ("input_0", lambda array: array[:0], "do not belong together"),
        ("input_0", lambda array: array + 1, "do not belong together"),
        ("input_0", lambda array: np.float32(3), "do not belong together"),
        ("labels", lambda array: array[:10], "do not belong together"),
        ("labels", lambda array: np.int64(3), "do not belong together"),
        ("hashes", lambda array: array.astype(str), "do not belong together"),
        ("logits", lambda array: array.astype(str), "do not belong together"),
        ("logits", lambda array: array[:, 0], "outputs of shape (300, 10), PyTorch gives (300,)"),
        ("tensor:head.bias", lambda array: np.array("text"), "head.bias: differs from PyTorch's tensor"),
        ("logits", lambda array: array[:10], "do not belong together"),
        ("logits", lambda array: array[::-1], "parity: "),
        ("tensor:head.bias", lambda array: array + 1, "head.bias: differs from PyTorch's tensor"),
    ],
)
def test_a_changed_reference_of_which_the_hash_was_computed_again_fails(vit_copy, key, change, words):
    edit_reference(vit_copy.path, key, change)
    rehash_reference(vit_copy.path)
    assert words in violations(vit_copy.path)


@pytest.mark.parametrize("name", ["", "blocks.0.attn.qkv.weight"])
def test_hashes_of_weights_cannot_be_left_out(vit_copy, name):
    path = reference_path(vit_copy.path)
    parts = {key: value for key, value in np.load(path).items() if not key.startswith(f"tensor:{name}")}
    np.savez_compressed(path, **parts)
    rehash_reference(vit_copy.path)
    names = [name] if name else sorted(layer.name for layer in vit_copy.certificate.layers)
    assert findings(vit_copy.path) == tuple(f"{each}: the reference has no hash of it" for each in names)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_fails(vit_copy, share):
    content = vit_copy.path.read_bytes()
    vit_copy.path.write_bytes(content[: int(share * len(content))])
    (line,) = findings(vit_copy.path)
    assert line.startswith("model.onnx: not a readable ONNX file, truncated: ")
    assert f"of the {len(content)} bytes" in line


def test_a_tensor_whose_bytes_were_cut_is_named(vit_copy):
    model = onnx.load(vit_copy.path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "blocks.0.mlp.fc1.weight")
    tensor.raw_data = tensor.raw_data[:-7]
    onnx.save(model, vit_copy.path)
    assert any(line.startswith("blocks.0.mlp.fc1.weight: ") for line in findings(vit_copy.path))


def test_the_command_lists_one_finding_a_line(vit_copy):
    rewrite(vit_copy.path, "blocks.0.attn.qkv.weight", lambda levels: np.full_like(levels, 3))
    result = CliRunner().invoke(main, ["verify", str(vit_copy.path)])
    first, *lines = result.stderr.splitlines()
    assert result.exit_code == 1
    assert first == f"ovit: error: model.onnx fails: {len(lines)} findings"
    assert "  - blocks.0.attn.qkv.weight: differs from PyTorch's tensor" in lines
    assert all(line.startswith("  - ") and len(line) < 250 for line in lines)


def test_what_is_missing_or_unreadable_is_said(vit_copy):
    certificate = vit_copy.path.with_name("model.certificate.json")
    reference = vit_copy.path.with_name("model.reference.npz")
    for file, missing, broken in (
        (certificate, "no certificate beside the file", "can't be read"),
        (reference, "no PyTorch reference", "reference_sha256 differs"),
    ):
        content = file.read_bytes()
        file.unlink()
        assert missing in violations(vit_copy.path)
        file.write_bytes(b"nonsense")
        assert broken in violations(vit_copy.path)
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
    verified = verify_file(path)
    assert verified.parity_stored == certificate.parity_stored
    assert str(verified.notes[-1]) == (
        "parity and accuracy were measured again on 100 of 300 images; what the certificate says of all 300 is taken "
        "on trust: --data measures them all"
    )
    again = verify_file(path, data=data)
    assert again.parity == certificate.parity
    assert "partly_measured" not in {note.code for note in again.notes}
    whole = certificate_path(path).read_text()
    edit_certificate(path, lambda content: content.update(parity_stored=None))
    assert findings(path) == ("parity_stored differs: the certificate says None, 100 images are stored",)
    certificate_path(path).write_text(whole)
    rewrite(path, "blocks.0.mlp.fc2.weight_scale", lambda scale: scale * 4)
    with pytest.raises(VerificationError, match="parity"):
        verify_file(path)


@pytest.mark.parametrize(("agreeing", "fits"), [(290, True), (291, False), (90, True), (89, False)])
def test_stored_images_bound_what_is_said_of_all(vit, agreeing, fits):
    """300 images of which 100 are stored: where 90 of those agree, 90 to 290 of all do."""

    def of(images, count):
        return vit.certificate.parity.model_copy(update={"images": images, "agreement": count / images})

    part = of(100, 90)
    stated = vit.certificate.model_copy(update={"parity": of(300, agreeing), "parity_stored": part})
    words = f"parity: {agreeing / 300:.2%} of 300 images can't agree where 90.00% of the 100 stored ones do"
    assert _beyond_the_part(stated, part) == ([] if fits else [words])


def test_the_labels_of_the_data_count_and_not_those_of_the_reference(vit_copy, digits):
    images, labels = (part[1000:1300] for part in digits)
    assert verify_file(vit_copy.path, data=[(images, labels)]).accuracy == vit_copy.certificate.accuracy
    wrong = labels.clone()
    wrong[:7] = (wrong[:7] + 1) % 10
    with pytest.raises(VerificationError, match="7 of 300 labels of the data are not the reference's"):
        verify_file(vit_copy.path, data=[(images, wrong)])


def test_a_renamed_file_is_the_same_file(vit_copy):
    for suffix in (".onnx", ".certificate.json", ".reference.npz"):
        vit_copy.path.with_name(f"model{suffix}").rename(vit_copy.path.with_name(f"deployed{suffix}"))
    assert verify_file(vit_copy.path.with_name("deployed.onnx")).sparsity == vit_copy.certificate.sparsity


def test_kernels_of_another_machine_are_said_to_be_its_own(vit_copy):
    stated = vit_copy.certificate
    machine = stated.machine.model_copy(update={"cpu": "Abacus"})
    other = stated.model_copy(update={"machine": machine, "kernels": {}, "runtime_ops": {}})
    certificate_path(vit_copy.path).write_text(other.to_json())
    note = verify_file(vit_copy.path).notes[-1]
    assert (note.code, note.names) == ("other_kernels", ("Abacus",))
    assert str(note).startswith("the certificate states the kernels of Abacus; ")
