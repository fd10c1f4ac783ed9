"""What a text editor can change in a certificate or a reference, and verification must notice."""

import hashlib
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ovit_engine import Engine, Recipe
from ovit_engine.certificate import ExportError, VerificationError
from ovit_engine.certificate import parity as parity_module
from ovit_engine.certificate.verify import verify_file

RECIPE = "modifiers: [{magnitude_prune: {sparsity: 0.75, targets: ['2.weight']}}, {quantize: {targets: ['2']}}]"


@pytest.fixture
def file(tmp_path, monkeypatch, request):
    """A file whose reference keeps 100 of 300 images where the test asks for that, else all."""
    if getattr(request, "param", None) == "part":
        monkeypatch.setattr(parity_module, "STORED_BYTES", 100 * 16 * 4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    engine = Engine(model, Recipe.parse(RECIPE), steps_per_epoch=4, epochs=1)
    optimizer = torch.optim.AdamW(model.parameters())
    engine.attach(optimizer)
    x, y = torch.randn(300, 16), torch.randint(5, (300,))
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    engine.detach()
    engine.export(tmp_path / "model.onnx", x[:1], data=[(x, y)], preprocessing={"size": [16]})
    return tmp_path / "model.onnx"


def edit(file, change: Callable[[dict[str, Any]], object]) -> None:
    certificate = file.with_name("model.certificate.json")
    content = json.loads(certificate.read_text())
    content["reference_sha256"] = hashlib.sha256(file.with_name("model.reference.npz").read_bytes()).hexdigest()
    change(content)
    certificate.write_text(json.dumps(content))


@pytest.mark.parametrize("file", ["whole", "part"], indirect=True)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(gzip_bytes=10), "gzip_bytes differs: the certificate says 10"),
        (lambda c: c.update(integer_kernels=99), "integer_kernels is 99, runtime_ops has"),
        (lambda c: c["accuracy"].update(file=0.999), "accuracy 0.9990 can't be"),
        (lambda c: c["accuracy"].update(file=0.999, pytorch=0.999), "accuracy of PyTorch: the certificate says 0.9990"),
        (lambda c: c["accuracy"].update(images=50_000), "accuracy of PyTorch"),
        (lambda c: c.update(accuracy=None), "disagree on whether there are labels"),
        (lambda c: c["parity"].update(images=50_000), "parity speaks of 50000 images"),
        (lambda c: c["parity"].update(source="random"), "parity speaks of 300 random images"),
    ],
)
def test_an_edited_certificate_fails(file, change, words):
    edit(file, change)
    with pytest.raises(VerificationError, match=words):
        verify_file(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts.update(input_0=parts["input_0"][:1]),
        lambda parts: parts.update(input_0=parts["input_0"][:0]),
        lambda parts: parts.update(input_0=parts["input_0"] + 1),
        lambda parts: parts.update(logits=parts["logits"][:10]),
        lambda parts: parts.update(labels=parts["labels"][:10]),
    ],
    ids=["one image", "no image", "other images", "fewer logits", "fewer labels"],
)
def test_an_edited_reference_fails(file, change):
    path = file.with_name("model.reference.npz")
    parts = dict(np.load(path))
    change(parts)
    np.savez_compressed(path, **parts)
    edit(file, lambda content: None)
    with pytest.raises(VerificationError, match="do not belong together"):
        verify_file(file)


@pytest.mark.parametrize("file", ["part"], indirect=True)
def test_where_a_part_of_the_images_is_kept_only_that_is_claimed(file):
    certificate = verify_file(file)
    assert certificate.parity.images == certificate.accuracy.images == 100
    assert any("measured again on 100 of the 300 images" in note for note in certificate.notes)


class LoopsOverTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.stack([self.layer(row) for row in x])


def exported(model: nn.Module, path, **options: Any) -> None:
    engine = Engine(model, Recipe.parse("modifiers: []"), steps_per_epoch=1, epochs=1)
    engine.attach(torch.optim.SGD(model.parameters(), 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no step was made
        engine.detach()
    engine.export(path, torch.randn(2, 4), **options)


def test_a_batch_that_the_models_code_fixes_is_refused(tmp_path):
    with pytest.raises(ExportError, match="fixes the batch of 'input' to 2"):
        exported(LoopsOverTheBatch(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_half_precision_model_is_told_what_to_do(tmp_path):
    with pytest.raises(ExportError, match=r"torch.bfloat16 weights: give a float32 copy, model.float\(\)"):
        exported(nn.Linear(4, 3).bfloat16(), tmp_path / "model.onnx", data=[torch.randn(64, 4).bfloat16()])


def test_a_folder_as_the_output_is_told_so(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name the file"):
        exported(nn.Linear(4, 3), tmp_path)


def test_a_renamed_file_is_the_same_file(file):
    for suffix in (".onnx", ".certificate.json", ".reference.npz"):
        file.with_name(f"model{suffix}").rename(file.with_name(f"deployed{suffix}"))
    assert verify_file(file.with_name("deployed.onnx")).sparsity == 0.75


def test_an_empty_recipe_exports_the_dense_file_without_training(tmp_path):
    engine = Engine(nn.Linear(4, 3), Recipe.parse("modifiers: []"), steps_per_epoch=1, epochs=1)
    certificate = engine.export(tmp_path / "dense.onnx", torch.randn(1, 4))
    assert "0 integer kernels" in str(certificate)
    assert "dense.onnx" in str(certificate)


def test_a_recipe_without_an_optimizer_is_told_to_train(tmp_path):
    engine = Engine(
        nn.Sequential(nn.Linear(4, 3)), Recipe.parse(RECIPE.replace("'2", "'0")), steps_per_epoch=1, epochs=1
    )
    with pytest.raises(RuntimeError, match="step 0 of 1: attach an optimizer and train first"):
        engine.export(tmp_path / "model.onnx", torch.randn(1, 4))
