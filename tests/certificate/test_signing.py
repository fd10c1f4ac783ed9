"""Signatures: exactly the file, its certificate and its reference, by key or certificate, offline."""

import base64
import hashlib
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from ovit_engine.certificate import VerificationError
from ovit_engine.certificate.model import certificate_path, page_path, reference_path
from ovit_engine.certificate.parity import Reference
from ovit_engine.certificate.signing import make_signer, sign_file, signature_path, verify_signature
from ovit_engine.certificate.tensors import hash_tensors
from ovit_engine.certificate.verify import verify_file
from ovit_engine.cli import main

EXTENSIONS = "keyUsage=critical,digitalSignature\nbasicConstraints=CA:FALSE\n"


def openssl(folder, *arguments):
    subprocess.run(["openssl", *map(str, arguments)], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A folder with two pairs of keys, and a certificate by a root."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other", "leaf", "root"):
        openssl(folder, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.pem")
        openssl(folder, "ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub")
    usage = ("-subj", "/CN=Root", "-addext", "keyUsage=critical,keyCertSign")
    openssl(folder, "req", "-x509", "-new", "-key", "root.pem", "-days", 30, *usage, "-out", "root.crt")
    (folder / "extensions").write_text(EXTENSIONS)
    openssl(folder, "req", "-new", "-key", "leaf.pem", "-subj", "/CN=Maker", "-out", "leaf.csr")
    by_root = ("-CA", "root.crt", "-CAkey", "root.pem", "-CAcreateserial", "-extfile", "extensions")
    openssl(folder, "x509", "-req", "-in", "leaf.csr", "-days", 30, *by_root, "-out", "leaf.crt")
    return folder


@pytest.fixture
def signed(vit_copy, keys):
    """(ONNX file, its signature by mine.pem)"""
    return vit_copy.path, sign_file(vit_copy.path, make_signer(keys / "mine.pem"))


def reason(path, signature, **options):
    with pytest.raises(VerificationError) as caught:
        verify_signature(path, signature, **options)
    (line,) = caught.value.violations
    return line


def test_the_signature_lies_beside_the_file_and_covers_three_files(signed, keys):
    path, signature = signed
    assert signature == signature_path(path) == path.with_name("model.sig")
    verify_signature(path, signature, key=keys / "mine.pub")
    payload = json.loads(base64.b64decode(json.loads(signature.read_text())["dsseEnvelope"]["payload"]))
    names = [resource["name"] for resource in payload["predicate"]["resources"]]
    assert names == ["model.certificate.json", "model.onnx", "model.reference.npz"]


def test_other_files_of_the_folder_do_not_matter(signed, keys):
    path, signature = signed
    page_path(path).write_text("another page")
    path.with_name("notes.txt").write_text("one more file")
    verify_signature(path, signature, key=keys / "mine.pub")


@pytest.mark.parametrize("place", [lambda path: path, certificate_path, reference_path])
def test_any_changed_byte_fails(signed, keys, place):
    path, signature = signed
    content = bytearray(place(path).read_bytes())
    content[len(content) // 2] ^= 1
    place(path).write_bytes(content)
    assert reason(path, signature, key=keys / "mine.pub") == f"{place(path).name}: changed since it was signed"


def test_a_file_of_which_every_hash_was_computed_again_fails(signed, keys):
    """One level of a weight is changed, and reference and certificate agree with it: `verify` alone can't know."""
    path, signature = signed
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "blocks.1.mlp.fc2.weight")
    levels = numpy_helper.to_array(tensor).copy()
    levels[tuple(np.argwhere((levels > 1) & (levels < 100))[0])] += 1
    tensor.CopyFrom(numpy_helper.from_array(levels, tensor.name))
    onnx.save(model, path)
    found = Reference.load(reference_path(path))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    tensors = {name: digest for name, digest in hash_tensors(model, arrays).items() if name in found.tensors}
    reference_path(path).write_bytes(Reference(**{**vars(found), "tensors": tensors}).to_bytes())
    content = json.loads(certificate_path(path).read_text())
    content["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    content["reference_sha256"] = hashlib.sha256(reference_path(path).read_bytes()).hexdigest()
    content["bytes"] = path.stat().st_size
    certificate_path(path).write_text(json.dumps(content))
    with pytest.raises(VerificationError) as caught:  # what a maker would measure again
        verify_file(path)
    for line in caught.value.violations:
        name = line.partition(" ")[0]
        content[name] = int(line.rpartition(" ")[2])
    certificate_path(path).write_text(json.dumps(content))
    assert verify_file(path).sparsity > 0
    with pytest.raises(VerificationError, match=r"model\.onnx: changed since it was signed"):
        verify_signature(path, signature, key=keys / "mine.pub")


def test_a_wrong_key_and_an_edited_signature_fail(signed, keys):
    path, signature = signed
    assert "model.sig is not valid for" in reason(path, signature, key=keys / "other.pub")
    bundle = json.loads(signature.read_text())
    del bundle["verificationMaterial"]["publicKey"]["hint"]
    first = bundle["dsseEnvelope"]["signatures"][0]
    raw = bytearray(base64.b64decode(first["sig"]))
    raw[-1] ^= 1
    first["sig"] = base64.b64encode(raw).decode()
    signature.write_text(json.dumps(bundle))
    assert "model.sig is not valid for" in reason(path, signature, key=keys / "mine.pub")
    signature.write_text("{}")
    assert reason(path, signature, key=keys / "mine.pub") == "model.sig is not a signature"


def test_an_edited_list_of_hashes_fails(signed, keys):
    """The list in a signature is what is signed: making it fit a changed file breaks the signature."""
    path, signature = signed
    path.write_bytes(path.read_bytes() + b"\0")
    bundle = json.loads(signature.read_text())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"][1]["digest"] = hashlib.sha256(path.read_bytes()).hexdigest()
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    signature.write_text(json.dumps(bundle))
    assert "model.sig is not valid for" in reason(path, signature, key=keys / "mine.pub")


def test_a_signature_of_other_files_is_said_to_be_so(signed, keys):
    path, signature = signed
    for suffix in (".onnx", ".certificate.json", ".reference.npz"):
        path.with_name(f"model{suffix}").rename(path.with_name(f"next{suffix}"))
    line = reason(path.with_name("next.onnx"), signature, key=keys / "mine.pub")
    assert line.startswith("it covers model.certificate.json, model.onnx, model.reference.npz, not next.cert")


def test_a_certificate_by_a_trusted_root(vit_copy, keys):
    signature = sign_file(vit_copy.path, make_signer(keys / "leaf.pem", keys / "leaf.crt"))
    verify_signature(vit_copy.path, signature, chain=[keys / "root.crt"])
    assert "model.sig is not valid for" in reason(vit_copy.path, signature, chain=[keys / "leaf.crt"])
    line = reason(vit_copy.path, signature, key=keys / "leaf.pub")
    assert line == "model.sig was made with a certificate: give trusted certificates"
    content = reference_path(vit_copy.path).read_bytes()
    reference_path(vit_copy.path).write_bytes(content + b"\0")
    line = reason(vit_copy.path, signature, chain=[keys / "root.crt"])
    assert line == "model.reference.npz: changed since it was signed"
    with pytest.raises(ValueError, match=r"can't sign with .*mine\.pem, .*leaf\.crt: The public key from the cert"):
        make_signer(keys / "mine.pem", keys / "leaf.crt")


def test_keys_that_can_not_be_read(signed, keys):
    with pytest.raises(ValueError, match=r"can't sign with .*mine\.pub: "):
        make_signer(keys / "mine.pub")
    with pytest.raises(ValueError, match=r"can't verify with .*extensions: "):
        verify_signature(*signed, key=keys / "extensions")


def test_a_key_of_another_kind_is_told_which_one_is_needed(signed, keys):
    openssl(keys, "genrsa", "-out", "rsa.pem", 2048)
    openssl(keys, "rsa", "-in", "rsa.pem", "-pubout", "-out", "rsa.pub")
    words = (
        r": an elliptic-curve key is needed: openssl ecparam -name prime256v1 -genkey -noout -out key\.pem makes one$"
    )
    with pytest.raises(ValueError, match=r"can't sign with .*rsa\.pem" + words):
        make_signer(keys / "rsa.pem")
    with pytest.raises(ValueError, match=r"can't verify with .*rsa\.pub" + words):
        verify_signature(*signed, key=keys / "rsa.pub")


@pytest.mark.parametrize("place", [lambda path: path, certificate_path, reference_path])
def test_a_missing_file_is_named(signed, keys, place):
    path, signature = signed
    place(path).unlink()
    assert reason(path, signature, key=keys / "mine.pub") == f"{place(path).name} is missing"
    with pytest.raises(VerificationError, match=f"{place(path).name} is missing"):
        sign_file(path, make_signer(keys / "mine.pem"))


def test_the_command(signed, keys):
    path, signature = map(str, signed)

    def verify(*options):
        return CliRunner().invoke(main, ["verify", path, *map(str, options)])

    done = verify("--signature", signature, "--public-key", keys / "mine.pub")
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"{signature} is a valid signature of it, its certificate and its reference\n")
    for options in (
        ("--signature", signature),
        ("--public-key", keys / "mine.pub"),
        ("--signature", signature, "--public-key", keys / "mine.pub", "--certificate-chain", keys / "root.crt"),
    ):
        refused = verify(*options)
        assert refused.exit_code == 2
        assert "--signature takes either --public-key or --certificate-chain" in refused.stderr
    assert verify("--signature", signature, "--public-key", keys / "other.pub").exit_code == 1
    refused = CliRunner().invoke(main, ["export", "run", "--output", "m.onnx", "--sign-certificate", signature])
    assert "certificates belong to a signature: name the key with --sign" in refused.stderr


def test_without_the_package_one_line_says_what_to_install(signed, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    monkeypatch.setitem(sys.modules, "model_signing.verifying", None)
    with pytest.raises(ValueError, match=r"^signatures need model_signing\.\w+: pip install 'ovit-engine\[sign\]'$"):
        verify_signature(*signed, key=keys / "mine.pub")
    with pytest.raises(ValueError, match=r"pip install 'ovit-engine\[sign\]'"):
        make_signer(keys / "mine.pem")
