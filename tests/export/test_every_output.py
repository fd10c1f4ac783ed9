"""Every output with a row for each image is compared, not only the first."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovit_engine.certificate.errors import ExportError
from ovit_engine.certificate.model import Promise
from ovit_engine.certificate.verify import verify_file
from ovit_engine.export.exporter import export_model

NOTHING = Promise(layers=())


class Heads(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 5), nn.Linear(16, 4)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        features = self.trunk(x).relu()
        scores, boxes = self.first(features), self.second(features)
        forms: dict[str, Any] = {
            "tuple": (scores, boxes),
            "mapping": {"scores": scores, "boxes": boxes},
            "nested": (scores, [{"boxes": boxes}]),
            "loss first": (scores.square().mean(), scores, boxes),
            "vector": scores[:, 0],
            "scalar": scores.mean(),
        }
        return forms[self.form]


def export(path: Path, form: str, reference: nn.Module | None = None) -> Any:
    return export_model(Heads(form), path, torch.ones(2, 8), promise=NOTHING, reference_model=reference)


@pytest.mark.parametrize("form", ["tuple", "mapping", "nested", "loss first"])
def test_a_fault_in_the_second_head_alone_is_found(form: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    certificate = export(path, form)
    assert certificate.parity.agreement == 1
    assert verify_file(path).parity == certificate.parity
    other = copy.deepcopy(Heads(form))
    with torch.no_grad():
        other.second.weight[0] *= 1.5
    path.unlink()
    with pytest.raises(ExportError, match=r"output_\d: parity: largest error is"):
        export(path, form, other)
    assert not path.exists()


def test_one_number_an_image(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert export(path, "vector").parity.agreement == 1
    verify_file(path)
    other = Heads("vector")
    with torch.no_grad():
        other.first.bias[0] += 5
    with pytest.raises(ExportError, match="of 256 images agree with PyTorch"):
        export(path, "vector", other)


def test_an_output_for_all_images_together_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no output has a row for each image"):
        export(tmp_path / "model.onnx", "scalar")
