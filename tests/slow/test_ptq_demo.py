"""Post-training quantization of the demo model, trained as the demo does."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from ovit_engine.cli import main


@pytest.mark.slow
def test_defaults_agree_with_float_on_98_of_100_images(tmp_path: Path) -> None:
    def ovit(*arguments: object) -> str:
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.output

    run, file = tmp_path / "run", tmp_path / "int8.onnx"
    ovit("train", "--recipe", "digits_vit_dense", "--data", "digits", "--output", run, "--device", "cpu")
    output = ovit("ptq", "--data", "digits", "--checkpoint", run, "--output", file)
    agreement = re.search(r"([\d.]+)% of 450 images", output)
    accuracy = re.search(r"accuracy ([\d.]+)% float, ([\d.]+)% int8", output)
    assert agreement
    assert accuracy
    assert float(agreement[1]) >= 98
    assert float(accuracy[1]) >= 95
    assert float(accuracy[2]) >= float(accuracy[1]) - 1
