"""Small models through the whole path, each exported once for all tests."""

import copy
import io
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from onnx import helper, numpy_helper
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn

from ovit_engine.certificate import Certificate, Promise, PromisedLayer, VerificationError
from ovit_engine.certificate.render import print_certificate
from ovit_engine.certificate.verify import verify_file
from ovit_engine.export.exporter import export_model
from ovit_engine.quant import bake, prepare_quantization, set_enabled, set_observing

RECIPE = """
name: tiny
modifiers:
- magnitude_prune: {pattern: "2:4", targets: ['re:blocks.*(qkv|proj|fc1|fc2).weight']}
- quantize: {}
"""


@dataclass(frozen=True)
class Exported:
    """A file, its certificate, and the fake-quantized model it came from."""

    path: Path
    certificate: Certificate
    model: nn.Module
    promise: Promise


def small(*nodes, **arrays):
    """A graph from x [2, 2] to y, of these nodes and initializers."""
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    values = [helper.make_tensor_value_info(name, 1, [2, 2]) for name in ("x", "y")]
    return helper.make_model(helper.make_graph(list(nodes), "g", values[:1], values[1:], tensors))


def findings(path, **options):
    """The lines of a verification that fails."""
    with pytest.raises(VerificationError) as caught:
        verify_file(path, **options)
    return caught.value.violations


def table_of(certificate):
    """What `print_certificate` prints, on one line."""
    stream = io.StringIO()
    print_certificate(certificate, Console(file=stream, width=1000))
    return " ".join(stream.getvalue().split())


class ResidualNet(nn.Module):
    """conv-bn-relu, a depthwise conv, a residual add, a linear on 2-D input."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = x + self.conv3(x)
        return self.head(x.mean((2, 3)))


def small_vit():
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=2,
        embed_dim=64,
        depth=2,
        num_heads=4,
        in_chans=1,
        num_classes=10,
    )


def quantized(model, names, images):
    """The model as after QAT: ranges from ``images``, enabled, frozen."""
    prepare_quantization(model, names)
    model.train()
    set_observing(model, True)
    for batch in images[:192].split(64):
        model(batch)
    set_observing(model, False)
    set_enabled(model, True)
    return model.eval()


def keep_two_of_four(weight):
    """Zero the two smallest of four neighbouring input channels."""
    rows = weight.detach().movedim(1, -1)
    groups = rows.reshape(-1, 4)
    groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0.0)
    weight.data = groups.reshape(rows.shape).movedim(-1, 1).contiguous()


@pytest.fixture(scope="session")
def digits():
    """(images [N, 1, 8, 8] in [-1, 1], labels [N])."""
    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target)


@pytest.fixture(scope="session")
def vit(digits, tmp_path_factory):
    """A 2:4 sparse int8 ViT, a few steps trained so that its logits differ."""
    torch.manual_seed(0)
    images, labels = digits
    model = small_vit()
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and "blocks" in name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch, target in zip(images[:960].split(64), labels[:960].split(64), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), target).backward()
        optimizer.step()
    for name in names:
        keep_two_of_four(model.get_submodule(name).weight)
    model = quantized(model, names, images)
    promise = Promise(
        layers=tuple(
            PromisedLayer(
                name=f"{name}.weight",
                zeros=model.get_submodule(name).weight.numel() // 2,
                pattern="2:4",
                quantized=True,
            )
            for name in names
        )
    )
    path = tmp_path_factory.mktemp("vit") / "model.onnx"
    certificate = export_model(
        bake(copy.deepcopy(model)),
        path,
        images[:1],
        promise=promise,
        recipe_text=RECIPE,
        recipe_name="tiny",
        preprocessing={"size": (1, 8, 8), "mean": [0.5], "std": [0.5], "crop": 1.0, "interpolation": "bilinear"},
        data=[(images[1000:1300], labels[1000:1300])],
        reference_model=model,
    )
    return Exported(path, certificate, model, promise)


@pytest.fixture(scope="session")
def convnet(digits, tmp_path_factory):
    """An int8 convolutional net with batch-norm, its kernels 2:4 along input channels where that is possible."""
    torch.manual_seed(0)
    images, _ = digits
    model = ResidualNet()
    nn.init.normal_(model.bn1.weight)
    keep_two_of_four(model.conv3.weight)
    names = ["conv1", "conv2", "conv3", "head"]
    model = quantized(model, names, images)
    layers = [PromisedLayer(name=f"{name}.weight", quantized=True) for name in names]
    layers[2] = PromisedLayer(name="conv3.weight", quantized=True, pattern="2:4", zeros=128)
    promise = Promise(layers=tuple(layers))
    path = tmp_path_factory.mktemp("convnet") / "model.onnx"
    certificate = export_model(
        bake(copy.deepcopy(model)), path, images[:2], promise=promise, data=[images[200:500]], reference_model=model
    )
    return Exported(path, certificate, model, promise)


@pytest.fixture
def vit_copy(vit, tmp_path):
    """The ViT's three files in a folder of one's own, to tamper with."""
    for file in vit.path.parent.iterdir():
        shutil.copy(file, tmp_path)
    return Exported(tmp_path / vit.path.name, vit.certificate, vit.model, vit.promise)
