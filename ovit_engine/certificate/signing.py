"""Signatures of a file, its certificate and its reference, by the OpenSSF `model-signing` package (extra `sign`).

Whoever rewrites all three files makes them agree with each other again; they cannot make a signature without the key.
Everything works offline, with an elliptic-curve key or with a certificate.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ovit_engine.certificate.errors import VerificationError
from ovit_engine.certificate.model import certificate_path, reference_path
from ovit_engine.utils.files import atomic_write

_MAKE_KEY = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"


def signature_path(path: Path) -> Path:
    """Return where the signature of an ONNX file lies."""
    return path.with_name(f"{path.stem}.sig")


def make_signer(key: Path, certificate: Path | None = None, chain: Sequence[Path] = ()) -> Any:
    """Return what `sign_file` signs with.

    Args:
        key: PEM file of an elliptic-curve private key without a password.
        certificate: PEM file of the X.509 certificate of the key; without it the signature names the key alone.
        chain: PEM files of the certificates between that one and the root.

    Raises:
        ValueError: `model-signing` is not installed, a key or certificate can't be read, or they don't belong together.
    """
    config = _package("signing").Config()
    try:
        if certificate is None:
            return config.use_elliptic_key_signer(private_key=key)
        return config.use_certificate_signer(
            private_key=key, signing_certificate=certificate, certificate_chain=chain or [certificate]
        )
    except Exception as error:  # cryptography's own exceptions share no other base
        files = ", ".join(map(str, [key, *([certificate] if certificate else []), *chain]))
        raise ValueError(f"can't sign with {files}: {_reason(error)}") from error


def sign_file(path: Path, signer: Any) -> Path:
    """Sign an ONNX file, its certificate and its reference; return the path of the signature."""
    output = signature_path(path)
    with _signed_files(path) as folder:
        staged = folder.parent / output.name
        signer.sign(folder, staged)
        atomic_write(output, lambda stream: stream.write(staged.read_bytes()))
    return output


def verify_signature(path: Path, signature: Path, *, key: Path | None = None, chain: Sequence[Path] = ()) -> None:
    """Check the signature of an ONNX file, its certificate and its reference.

    Args:
        path: of the ONNX file.
        signature: what `sign_file` wrote.
        key: PEM file of the public key.
        chain: in place of the key, PEM files of the certificates that are trusted.

    Raises:
        VerificationError: a byte of the three files differs, or the signature is of another key or of other files.
        ValueError: `model-signing` is not installed, or a key or certificate can't be read.
    """
    config = _package("verifying").Config()
    try:
        if key is not None:
            config.use_elliptic_key_verifier(public_key=key)
        elif chain:
            config.use_certificate_verifier(certificate_chain=chain)
        else:
            raise ValueError("a signature proves nothing without a public key or certificates")
    except Exception as error:
        raise ValueError(
            f"can't verify with {', '.join(map(str, [key] if key else chain))}: {_reason(error)}"
        ) from error
    bundle = _read_bundle(signature)
    if ("publicKey" in bundle["verificationMaterial"]) != (key is not None):
        made, needed = ("a certificate", "trusted certificates") if key else ("a key", "its public key")
        what = f"{signature.name} was made with {made}: give {needed}"
        raise VerificationError("the signature can't be checked", [what])
    with _signed_files(path) as folder:
        changed = _changed_files(folder, bundle)
        if changed:
            raise VerificationError("the signature does not hold", changed)
        try:
            config.verify(folder, signature)
        except Exception as error:
            reason = f"{signature.name} is not valid for {', '.join(map(str, [key] if key else chain))}: "
            raise VerificationError("the signature does not hold", [reason + _reason(error)]) from error


def _package(module: str) -> Any:
    try:
        return import_module(f"model_signing.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(f"signatures need {error.name}: pip install 'ovit-engine[sign]'") from None


@contextmanager
def _signed_files(path: Path) -> Iterator[Path]:
    """Yield a folder with copies of exactly the files that a signature covers: the package signs whole folders."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / path.stem
        folder.mkdir()
        files = path, certificate_path(path), reference_path(path)
        if missing := [f"{file.name} is missing" for file in files if not file.is_file()]:
            raise VerificationError("a signature covers an ONNX file, its certificate and its reference", missing)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        yield folder


def _read_bundle(signature: Path) -> dict[str, Any]:
    """Return the Sigstore bundle in a signature's file, its payload decoded; nothing in it is proven yet."""
    try:
        bundle: dict[str, Any] = json.loads(signature.read_text(encoding="utf-8"))
        payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        resources = {each["name"]: each["digest"] for each in payload["predicate"]["resources"]}
        return {"verificationMaterial": bundle["verificationMaterial"], "resources": resources}
    except (KeyError, TypeError, ValueError) as error:
        raise VerificationError("the signature can't be read", [f"{signature.name} is not a signature"]) from error


def _changed_files(folder: Path, bundle: dict[str, Any]) -> list[str]:
    """Return a line for each file that is not the signed one, or that the signature does not cover."""
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    signed = bundle["resources"]
    if signed.keys() != digests.keys():
        return [f"it covers {', '.join(sorted(signed))}, not {', '.join(sorted(digests))}"]
    return [f"{name}: changed since it was signed" for name in sorted(signed) if signed[name] != digests[name]]


def _reason(error: Exception) -> str:
    if isinstance(error, AttributeError):  # model-signing asks every key for its curve
        return f"an elliptic-curve key is needed: {_MAKE_KEY} makes one"
    return " ".join(str(error).split()) or type(error).__name__
