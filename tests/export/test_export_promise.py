"""A file that is not what was promised is not written."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from ovit_engine.certificate import Certificate, ExportError, Promise, PromisedLayer
from ovit_engine.certificate.check import check
from ovit_engine.certificate.render import print_certificate
from ovit_engine.export.exporter import export_model
from ovit_engine.quant import bake


def linear(zero=(), out=4):
    """A linear layer whose inputs ``zero`` are pruned."""
    torch.manual_seed(0)
    layer = nn.Linear(8, out)
    with torch.no_grad():
        layer.weight[:, list(zero)] = 0
    return nn.Sequential(layer)


def promised(**facts):
    return Promise(layers=(PromisedLayer(name="0.weight", **facts),))


def export(model, path, promise, **options):
    return export_model(model, path, torch.randn(2, 8), promise=promise, **options)


def test_the_certificate_says_what_was_measured(vit):
    certificate = vit.certificate
    assert len(certificate.quantized) == 8
    assert certificate.sparsity >= 0.5
    assert certificate.int8_share > 0.95
    assert certificate.bytes == vit.path.stat().st_size
    assert certificate.gzip_bytes < certificate.bytes
    assert certificate.inputs == {"input": ("batch", 1, 8, 8)}
    assert certificate.parity.images == 300
    assert certificate.parity.source == "data"
    assert certificate.parity.agreement >= 0.99
    assert certificate.accuracy.images == 300
    assert abs(certificate.accuracy.file - certificate.accuracy.pytorch) <= 0.01
    assert certificate.preprocessing["size"] == [1, 8, 8]
    assert certificate.versions.keys() >= {"torch", "onnx", "onnxruntime", "python"}
    assert check(certificate, vit.promise) == []


def test_it_lies_beside_the_file_and_reads_back(vit):
    assert {file.name for file in vit.path.parent.iterdir()} == {
        "model.onnx",
        "model.certificate.json",
        "model.certificate.html",
        "model.reference.npz",
    }
    text = (vit.path.parent / "model.certificate.json").read_text()
    assert Certificate.from_json(text) == vit.certificate
    assert json.loads(text)["promise"]["layers"][0]["pattern"] == "2:4"


def test_it_is_readable_and_plain_where_there_is_no_terminal(vit):
    stream = io.StringIO()
    print_certificate(vit.certificate, Console(file=stream, width=160))
    text = stream.getvalue()
    assert "\x1b" not in text
    for words in ("8 MatMulIntegerToFloat", "same argmax as PyTorch on 300 images", "blocks.1.mlp.fc2.weight", "top-1"):
        assert words in text


def test_a_promise_that_holds(tmp_path):
    certificate = export(linear(zero=(0, 1, 4, 5)), tmp_path / "m.onnx", promised(zeros=16, pattern="2:4"))
    assert certificate.sparsity == 0.5
    assert certificate.parity.source == "random"
    assert [note.code for note in certificate.notes] == ["random_inputs"]


@pytest.mark.parametrize(
    ("promise", "violation"),
    [
        (promised(quantized=True), "0.weight: promised int8, the file stores FLOAT"),
        (promised(zeros=17), "0.weight: promised 17 zeros, the file has 16 of 32"),
        (promised(pattern="1:4"), "0.weight: promised 1:4, 8 groups with more than 1 non-zero"),
        (promised(pattern="2:3"), "0.weight: promised 2:3, groups that cannot be formed with more than 2 non-zero"),
        (
            promised(zeros=16, pattern={"block": [1, 4]}),
            "0.weight: promised 16 zeros in tiles of 1x4, the file has 0",
        ),
        (Promise(layers=(PromisedLayer(name="1.weight"),)), "1.weight: no such weight in the file"),
    ],
)
def test_a_broken_promise_raises_names_it_and_leaves_nothing(tmp_path, promise, violation):
    with pytest.raises(ExportError, match=r"m\.onnx breaks its promise") as caught:
        export(linear(zero=(0, 1, 4, 5)), tmp_path / "m.onnx", promise)
    assert caught.value.violations == (violation,)
    assert list(tmp_path.iterdir()) == []


def test_every_violation_is_named(tmp_path):
    with pytest.raises(ExportError) as caught:
        export(linear(), tmp_path / "m.onnx", promised(quantized=True, zeros=1, pattern="2:4"))
    assert len(caught.value.violations) == 3


def test_another_model_as_reference_is_low_parity_and_the_old_file_stays(tmp_path):
    path = tmp_path / "m.onnx"
    export(linear(), path, Promise())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = linear(zero=range(4))
    with pytest.raises(ExportError, match="of 256 images agree with PyTorch, 90% needed"):
        export(linear(), path, Promise(), reference_model=other)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def with_parity(certificate, **numbers):
    """Violations of a certificate with other parity numbers."""
    parity = certificate.parity.model_copy(update=numbers)
    return check(certificate.model_copy(update={"parity": parity}), Promise())


def test_cosine_and_largest_error_have_bars_of_their_own(vit):
    assert with_parity(vit.certificate, cosine=0.99, max_error=0.1) == []
    assert with_parity(vit.certificate, cosine=0.98) == ["parity: mean cosine of the logits 0.9800, 0.99 needed"]
    (line,) = with_parity(vit.certificate, max_error=0.11)
    assert line == "parity: largest error is 0.110 of the largest logit, at most 0.1 allowed"


def test_on_images_the_bar_is_higher_than_on_noise(vit):
    def with_agreement(source, agreement):
        return with_parity(vit.certificate, source=source, agreement=agreement)

    assert with_agreement("random", 0.91) == with_agreement("data", 0.99) == []
    assert with_agreement("data", 0.98) == ["parity: 98.00% of 300 images agree with PyTorch, 99% needed"]
    assert len(with_agreement("random", 0.89)) == 1


def test_outputs_that_are_not_finite(tmp_path):
    model = linear()
    with torch.no_grad():
        model[0].bias.fill_(float("nan"))
    with pytest.raises(ExportError, match="the file's outputs hold NaN or infinity"):
        export(model, tmp_path / "m.onnx", Promise())
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_scale_is_caught(vit, digits, tmp_path):
    baked = bake(copy.deepcopy(vit.model))
    baked.blocks[0].mlp.fc1.weight_scale *= 4
    with pytest.raises(ExportError, match="parity"):
        export_model(
            baked,
            tmp_path / "m.onnx",
            digits[0][:1],
            promise=vit.promise,
            data=[digits[0][:256]],
            reference_model=vit.model,
        )


def test_few_images_are_told_and_too_few_refused(tmp_path):
    images = torch.randn(40, 8)
    certificate = export(linear(), tmp_path / "m.onnx", Promise(), data=[images])
    assert certificate.parity.images == 40
    assert certificate.accuracy is None
    assert [(note.code, note.count) for note in certificate.notes] == [("few_images", 40)]
    with pytest.raises(ValueError, match="data holds 20 images; parity needs 32"):
        export(linear(), tmp_path / "m.onnx", Promise(), data=[images[:20]])


def test_modes_of_the_reference_model_are_as_before(tmp_path):
    reference = nn.Sequential(*linear(), nn.Sequential(nn.Dropout(), nn.Identity())).train()
    reference[1][1].eval()
    export(linear(), tmp_path / "m.onnx", Promise(), reference_model=reference)
    assert [module.training for module in reference.modules()] == [True, True, True, True, False]


def test_a_missing_folder_is_said_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        export(linear(), tmp_path / "nowhere" / "m.onnx", Promise())


def test_preprocessing_that_json_cannot_hold_is_said_before_any_work(tmp_path):
    with pytest.raises(
        ValueError, match=r"preprocessing: .* Tensor is not JSON .*; give finite .* \(tensor.tolist\(\)\)"
    ):
        export(linear(), tmp_path / "m.onnx", Promise(), preprocessing={"mean": torch.zeros(3)})


class _Watched(nn.Linear):
    """Notes with which precision it is to compute."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.seen = set()

    def forward(self, x):
        backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        self.seen.add(tuple(backend.fp32_precision for backend in backends))
        return super().forward(x)


def test_the_file_is_compared_with_whole_float32(tmp_path):
    """On a GPU convolutions are rounded to TF32 unless told otherwise, products if the training script said so."""
    reference = linear()
    watched = _Watched(8, 4)
    watched.load_state_dict(reference[0].state_dict())
    before = torch.backends.cudnn.conv.fp32_precision
    export(linear(), tmp_path / "m.onnx", Promise(), reference_model=nn.Sequential(watched))
    assert watched.seen == {("ieee", "ieee")}
    assert torch.backends.cudnn.conv.fp32_precision == before
